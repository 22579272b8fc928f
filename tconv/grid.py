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

from .configs import LEAST_STEPS, MOST_SUM, PARTS, WORKSPACE_ELEMENTS, Target, cdiv, power_of_two
from .geometry import Axis, Geometry, sizes3

PIECE = 4  # fp32 elements of 16 bytes
PLACES = 32  # of a step along the sums: 128 bytes, a swizzled row
LEAST_CHANNELS = 32  # on both sides: below, most of the tensor core's tile is padding
LEAST_PLACES = 64  # of a grid, which copies and launches of their own are worth
MOST_PLACES_A_PIXEL = 2  # zeros around rows, and parts of images that do not come out even
LEAST_PRODUCTS = (
    32  # for each element of the output's gradient: of k1 s2 or k3 s5 most of it would be copied for nothing
)
MOST_ELEMENTS = 1 << 29  # of both copies together: 2 GB
SHARED = 96 * 1024  # bytes of stages, of which a multiprocessor has twice as many


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
    """A tile of the product: input channels by output channels."""

    inputs: int
    outputs: int
    num_warps: int
    num_stages: int

    def describe(self) -> str:
        return (
            f"{self.inputs} input x {self.outputs} output channels, {PLACES} places a step, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


def takes(problem, how: str, target: Target) -> bool:
    """Whether the kernel takes a problem (problem.Problem) at a precision."""
    p, g = problem, problem.geometry
    if p.direction != "backward_weight" or g.groups > 1 or p.large or how not in PARTS:
        return False
    if target.backend != "interpreter" and (target.backend, target.arch) != ("cuda", 90):
        return False
    if min(p.channels) < LEAST_CHANNELS or p.c_in * g.taps < LEAST_PRODUCTS * prod(g.stride):
        return False
    of_input, of_output = spots(g, p.batch, p.input_size).places(p.batch)
    elements = PARTS[how] * (p.c_in * of_input + prod(g.stride) * p.c_out * of_output)
    return LEAST_PLACES <= of_input <= MOST_PLACES_A_PIXEL * p.pixels and elements <= MOST_ELEMENTS


def choose(problem, how: str, target: Target) -> tuple[Grid, int, int]:
    """The tile, into how many parts the sums over places are cut, and how many steps each has."""
    p, taps = problem, problem.geometry.taps
    inputs, outputs = (_tile(c, least) for c, least in zip(p.channels, (64, 32)))
    # Two programs a multiprocessor, one of which multiplies while the other adds up; of the largest tile one, of two groups of warps.
    programs = 1 if inputs * outputs == 128 * 128 else 2
    stages = min(4, 2 * SHARED // (programs * 4 * PLACES * PARTS[how] * (inputs + outputs)))
    tile = Grid(inputs, outputs, 8 // programs, stages)
    places = spots(p.geometry, p.batch, p.input_size).places(p.batch)[0]
    tiles = taps * cdiv(p.c_in, inputs) * cdiv(p.c_out, outputs)
    # Two rounds of the GPU are enough: each part of the sums is as many results to be written and added.
    want = max(1, round(2 * programs * target.processors / tiles), cdiv(places, MOST_SUM))
    steps = cdiv(places, PLACES)
    count = max(1, min(want, cdiv(steps, LEAST_STEPS), WORKSPACE_ELEMENTS // (taps * p.c_in * p.c_out)))
    each = cdiv(steps, count)
    return tile, cdiv(steps, each), each


def _tile(channels: int, least: int) -> int:
    """Of the sizes from `least` to 128, the one that pads channels least, and the largest of these."""
    sizes = [n for n in (32, 64, 128) if least <= n <= power_of_two(channels, least, 128)]
    return min(sizes, key=lambda n: (cdiv(channels, n) * n, -n))


class Tile(NamedTuple):
    """What a program of the copy takes: channels by images by places along the width, phases side by side."""

    channels: int
    images: int
    width: int


def copied(channels: int, images: int, width: int, channels_last: bool) -> Tile:
    """The tile of a copy of so many channels, images (of parts) and places along the width, times phases: neighbours on the one side and
    on the other are whole sectors of 32 bytes at least."""
    if channels_last:
        of_channels, of_images = power_of_two(channels, 1, 32), power_of_two(images, 4, 16)
        return Tile(of_channels, of_images, power_of_two(width, 1, 4096 // (of_channels * of_images)))
    of_images = power_of_two(images, 4, 32)
    of_width = power_of_two(width, 1, 4096 // (of_images * (1 if of_images == 32 else 4)))
    return Tile(power_of_two(channels, 1, 4096 // (of_images * of_width)), of_images, of_width)
