"""A weight's gradient on a grid of pixels (kernels/grid.py): how both activations lie on it, the tile, and which problems take it.

With t * dilation - padding = (behind - ahead) * stride + phase, 0 <= phase < stride, a tap's gradient is

    gw[t] = sum over i of x[i] * gy_phase[i + behind],   gy_phase[j] = gy[(j - ahead) * stride + phase],

where `ahead` is that of all taps together, so that `behind` is never negative.  Laid out on a common grid, with zeros around
the input, each tap's gradient is a product of two matrices [channels, places], one of them seen some places further on: sums run
along memory, which is how the tensor core takes fp32 operands, and bulk copies bring them in as they are.  Bulk copies begin
at multiples of 16 bytes: so images lie innermost, and where there is no multiple of 4 of them they are cut into parts.

Pure integers; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

from .configs import MOST_SUM, PARTS, WORKSPACE_ELEMENTS, Target, cdiv
from .geometry import Axis, Geometry, sizes3

PIECE = 4  # fp32 elements of 16 bytes
PLACES = 32  # of a step along the sums: 128 bytes, a swizzled row
# On both sides: below, the tensor core's tile is mostly padding.  From 16 to 31 the estimate is 1.1 to 5 times the portable kernel's speed
# over the suites' layers; not measured.
LEAST_CHANNELS = 16
LEAST_PLACES = 64  # of a grid, which copies and launches of their own are worth
MOST_PLACES_A_PIXEL = 2  # zeros around rows, and parts of images that do not come out even
# Products for each element of the output's gradient.  Below, copies take longer than what they save, of channels_last, which the portable
# kernel reads well, sooner (H200, ten layers each: 64 products 1.05 times its speed in NCHW, 0.67 in channels_last; 128 1.08 there).
LEAST_PRODUCTS, LEAST_PRODUCTS_LAST = 64, 128
MOST_ELEMENTS = 1 << 30  # of both copies together: 4 GB
SHARED = 192 * 1024  # bytes of stages that a multiprocessor has
# (input channels, output channels, taps) of a tile: how many programs a multiprocessor has, and the ns of a step of all of them, as an H200
# took them in IEEE fp32; several taps read the input's part once.
TILES = {
    (128, 128, 1): (1, 1300),
    (64, 128, 1): (1, 730),
    (128, 64, 1): (1, 780),
    (128, 64, 2): (1, 1480),
    (64, 64, 1): (2, 755),
    (64, 64, 2): (2, 1480),
    (64, 32, 1): (2, 480),
    (64, 32, 2): (2, 947),
    (64, 32, 4): (1, 1450),
}
TF32 = 0.4  # of that time, at TF32 (not measured)
# Bytes a ns that are read for the first time, and again; written; and us of a program's beginning and end.
READ_FIRST, READ_AGAIN, WRITTEN, ENDS = 4000, 12500, 2600, 2.5
MOST_ROUNDS = 8  # of the GPU, that parts of the sums are tried for


class Spots(NamedTuple):
    """Where pixels lie on the grid, along (depth, height, width)."""

    parts: int  # of an image
    step: tuple[int, ...]  # the input's pixels from one part to the next; 0 along the axes that are not cut
    rows: tuple[int, ...]  # places of the input's grid
    reached: tuple[int, ...]  # places of that of the output's gradient: along all axes but the one that is cut, as many

    def places(self, batch: int) -> tuple[int, int]:
        """All places of the input's grid and of the output's gradient's."""
        return prod(self.rows) * self.parts * batch, prod(self.reached) * self.parts * batch


def lead(axis: Axis) -> int:
    """How far the first tap's phase is from that of 0: behind and phase of tap t are the quotient and remainder of
    t * dilation + lead by the stride."""
    return -axis.padding % axis.stride


def spots(geometry: Geometry, batch: int, size) -> Spots:
    """The grid of a layer; size: the input's."""
    parts, cut = PIECE // gcd(batch, PIECE), 3 - geometry.ndim
    whole = sizes3(size)
    input = tuple(cdiv(n, parts) if i == cut else n for i, n in enumerate(whole))
    behind = (((a.kernel - 1) * a.dilation + lead(a)) // a.stride for a in geometry.axes3)
    reached = tuple(n + more for n, more in zip(input, behind))
    # What lies beyond the outermost axis of one grid is beyond the other's end.
    rows = tuple(n if i <= cut else more for i, (n, more) in enumerate(zip(input, reached)))
    return Spots(parts, tuple(n if i == cut else 0 for i, n in enumerate(input)), rows, reached)


@dataclass(frozen=True)
class Grid:
    """A tile of the products: input channels by output channels of several taps."""

    inputs: int
    outputs: int
    taps: int
    num_stages: int

    @property
    def num_warps(self) -> int:
        return self.inputs // 16  # 64 rows a group of four warps

    def describe(self) -> str:
        return (
            f"{self.inputs} input x {self.outputs} output channels of {self.taps} taps, {PLACES} places a step, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )

    def programs(self, c_in: int, c_out: int, taps: int) -> int:
        """How many tiles a part of the sums has."""
        return cdiv(c_in, self.inputs) * cdiv(c_out, self.outputs) * cdiv(taps, self.taps)

    def stage(self, parts: int) -> int:
        """Bytes that a step brings in; parts: TF32 values of an element."""
        return 4 * PLACES * parts * (self.inputs + self.outputs * self.taps)


def _tile(size: tuple[int, int, int], parts: int) -> Grid:
    stages = SHARED // TILES[size][0] // Grid(*size, 0).stage(parts)
    return Grid(*size, min(4, stages))


def takes(problem, how: str, target: Target) -> bool:
    """Whether the kernel takes a problem (problem.Problem) at a precision."""
    p, g = problem, problem.geometry
    if p.direction != "backward_weight" or g.groups > 1 or p.large or how not in PARTS:
        return False
    if target.backend != "interpreter" and not target.is_hopper:
        return False
    least = LEAST_PRODUCTS_LAST if p.channels_last else LEAST_PRODUCTS
    if min(p.channels) < LEAST_CHANNELS or p.products_of_output < least:
        return False
    of_input, of_output = spots(g, p.batch, p.input_size).places(p.batch)
    elements = PARTS[how] * (p.c_in * of_input + prod(g.stride) * p.c_out * of_output)
    return LEAST_PLACES <= of_input <= MOST_PLACES_A_PIXEL * p.pixels and elements <= MOST_ELEMENTS


def choose(problem, how: str, target: Target) -> tuple[Grid, int, int]:
    """The tile, into how many parts the sums over places are cut, and how many steps each has, by the least estimated time."""
    p, taps, parts = problem, problem.geometry.taps, PARTS[how]
    places = spots(p.geometry, p.batch, p.input_size).places(p.batch)
    steps, weights = cdiv(places[0], PLACES), taps * p.c_in * p.c_out
    once = 4 * parts * (p.c_in * places[0] + prod(p.geometry.stride) * p.c_out * places[1])
    # No accumulator runs over more than MOST_SUM places where the workspace allows.
    most = max(1, min(steps, WORKSPACE_ELEMENTS // weights))
    least = min(most, cdiv(places[0], MOST_SUM))
    found = []
    for size, (resident, ns) in TILES.items():
        tile, slots = _tile(size, parts), resident * target.processors
        programs, step = tile.programs(p.c_in, p.c_out, taps), ns / 1e3 * (1 if parts == 2 else TF32)
        again = max(0, programs * steps * tile.stage(parts) - once)
        reading = (once / READ_FIRST + again / READ_AGAIN) / 1e3
        for rounds in range(1, MOST_ROUNDS + 1):
            each = cdiv(steps, min(most, max(least, rounds * slots // programs)))
            count = cdiv(steps, each)
            time = max(reading, cdiv(programs * count, slots) * (each * step + ENDS))
            found.append((time + 8 * count * weights / WRITTEN / 1e3, count, each, tile))
    _, count, each, tile = min(found, key=lambda choice: choice[:2])
    return tile, count, each


class CopyTile(NamedTuple):
    """What a program of the copy takes: channels by images by places along the width, phases side by side."""

    channels: int
    images: int
    width: int


# By whether channels lie side by side.  Few, each of which is compiled for 1, 2 and 4 parts of images: over the suites' layers they leave 12 % of
# the lanes without an element, as any tiles of 4096 elements do.
COPIED = {
    False: (CopyTile(16, 4, 64), CopyTile(16, 8, 32), CopyTile(16, 16, 16), CopyTile(8, 32, 16)),
    True: (CopyTile(32, 4, 32), CopyTile(32, 8, 16), CopyTile(32, 16, 8), CopyTile(32, 32, 4)),
}


def copied(channels: int, images: int, width: int, channels_last: bool) -> CopyTile:
    """The tile of a copy of so many channels, images (of parts) and places along the width, times phases: the one that pads least, with
    longer runs of what is read, and whole sectors of 32 bytes of what is written, preferred."""

    def cost(tile):
        padded = prod(cdiv(n, of) * of for n, of in zip((channels, images, width), tile))
        read = tile.channels if channels_last else tile.width
        return padded * (1 + 4 / read) * (1.25 if tile.images < min(8, images) else 1)

    return min(COPIED[channels_last], key=cost)
