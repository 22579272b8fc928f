"""The row kernel's tiles (kernels/rows.py), and which forward passes of few output channels it takes.

Pure integers; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from .configs import Target, cdiv, power_of_two
from .geometry import Axis, Geometry, sizes3

# What an H200 took in less time than any other kernel: few columns, pairs of a tap and an output channel, which are one tile's, of wide images.
# Of small ones (32x32, 64 to 3 channels k4 s2) strips have too little of their own; with 5 output channels, and in 1-d, the shift kernel was
# as fast (4 were not tried).
FEW_OUT = 3
LEAST_COLUMNS, MOST_COLUMNS = 17, 128
LEAST_CHANNELS = 32
LEAST_WIDTH, LEAST_PIXELS = 96, 1 << 16  # of the input's image, and of its whole batch
MOST_BACK = 16  # inputs along the width that a position needs before its own
RINGS = 40 << 20  # bytes of all programs' rings, in the L2
PIXELS, WARPS = 128, 4  # of a step


@dataclass(frozen=True)
class Shape:
    """By a tile's columns: programs a multiprocessor, registers of a thread (0: as many as it takes), and stages."""

    resident: int
    registers: int
    num_stages: int


def shape(columns: int) -> Shape:
    """What was fastest for tiles of so many columns (docs/kernels.md)."""
    return Shape(3, 168, 3) if columns <= 64 else Shape(2, 0, 2)


@dataclass(frozen=True)
class Rows:
    """What a program multiplies at a step: rows x width pixels by columns, so many channels at a time; its ring's rows, and into how
    many chunks of how many rows an image is cut."""

    rows: int
    width: int
    columns: int
    channels: int
    ring: int
    chunks: int
    chunk_rows: int
    piece: int  # pixels, of which strips have whole ones
    shape: Shape

    def describe(self) -> str:
        return (
            f"{self.columns} columns x {self.rows}x{self.width} pixels x {self.channels} channels, a ring of {self.ring} rows, "
            f"{self.chunks} chunks of {self.chunk_rows} rows, {WARPS} warps, {self.shape.num_stages} stages"
        )


def reached(geometry: Geometry, size, axis: int) -> tuple[int, int]:
    """Of the output positions, padding included, along an axis of three, in whole strides: the first, and how many there are."""
    a, padding = geometry.axes3[axis], ((0,) * (3 - geometry.ndim) + geometry.output_padding)[axis]
    first = a.padding // a.stride
    return first, (a.output_size(size[axis], padding) - 1 + a.padding) // a.stride - first + 1


def back(axis: Axis) -> int:
    """How many inputs before its own a position needs."""
    return (axis.kernel - 1) * axis.dilation // axis.stride


def before(axis: Axis, piece: int) -> int:
    """`back` along the width, or more, so that strips begin at whole pieces."""
    return back(axis) + (axis.padding // axis.stride - back(axis)) % piece


def inner(axis: Axis, width: int, piece: int) -> int:
    """Of so many pixels of a strip, how many have positions of their own."""
    return (width - before(axis, piece)) // piece * piece


def warm(axis: Axis, rows: int) -> int:
    """How many rows a chunk begins early, in whole steps."""
    return cdiv(back(axis), rows) * rows


def takes(problem, how: str, target: Target) -> bool:
    """Whether the kernel takes a problem (problem.Problem) at a precision."""
    p, g = problem, problem.geometry
    if p.direction != "forward" or g.groups > 1 or p.large or g.ndim != 2 or how not in ("half", "widen", "tf32"):
        return False
    # Elsewhere nobody has run it; for sm_80 up to 600 bytes of a thread's registers are spilled.
    if target.backend != "interpreter" and not target.is_hopper:
        return False
    if p.c_out > FEW_OUT or not LEAST_COLUMNS <= p.c_out * g.taps <= MOST_COLUMNS or p.c_in < LEAST_CHANNELS:
        return False
    if any(a.kernel < a.stride for a in g.axes):  # code for phases without taps would be most of it
        return False
    if min(g.output_size(p.input_size)) == 0 or back(g.axes[-1]) >= MOST_BACK:
        return False
    return p.input_size[-1] >= LEAST_WIDTH and p.pixels >= LEAST_PIXELS


def choose(problem, target: Target) -> Rows | None:
    """The tile by which the busiest program has the fewest steps, of those whose rings stay in the L2; None where there is none."""
    p, g, size, half = problem, problem.geometry, sizes3(problem.input_size), problem.dtype.itemsize == 2
    _, tall, wide = g.axes3
    (_, rows_q), (_, width_q) = (reached(g, size, axis) for axis in (1, 2))
    piece = gcd(p.vector, 8 if half else 4, size[2]) if p.source == "width" else 1
    columns, channels = power_of_two(p.c_out * g.taps, 16, MOST_COLUMNS), power_of_two(p.c_in, 16, 64 if half else 32)
    of_tile = shape(columns)
    slots = of_tile.resident * target.processors
    found = []
    for rows in (1, 2, 4, 8):
        width = PIXELS // rows
        if inner(wide, width, piece) <= 0:
            continue
        strips = p.batch * cdiv(width_q, inner(wide, width, piece))
        steps = cdiv(rows_q, rows)
        each = cdiv(steps, max(1, min(steps, slots // strips)))
        chunks, ring = cdiv(steps, each), power_of_two(rows + back(tall), 1, 1 << 30)
        early = warm(tall, rows) // rows if chunks > 1 or tall.padding >= tall.stride else 0
        if 4 * slots * p.c_out * g.taps * ring * width > RINGS:
            continue
        tile = Rows(rows, width, columns, channels, ring, chunks, each * rows, piece, of_tile)
        found.append((cdiv(strips * chunks, slots) * (each + early), -width, tile))
    return min(found, key=lambda choice: choice[:2])[2] if found else None
