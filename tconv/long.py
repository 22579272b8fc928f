"""The long-stride kernels' tiles (kernels/long.py), and which problems they take: few channels, long kernels and strides.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from .columns import UNROLL, WeightColumns
from .configs import WORKSPACE_ELEMENTS, Target, cdiv, power_of_two
from .geometry import Geometry, sizes3

# Along the width, from so many on: neighbouring threads that took neighbouring pixels would each touch a sector of their own.
STRIDE = 8
# In channels_last, fewer channels than these in all: of more, neighbours are better off as channels, in the direct kernels.
LAST_CHANNELS = 32
# In backward_input, layers for which tensor cores would do: at most so many channels on either side, from so many phases on
# (k64 s32 has 1024, of which cuDNN takes 6 us each), and products, which the CUDA cores do in about 0.5 ms.
CHANNELS, PHASES, PRODUCTS = 32, 256, 1 << 32
SHORT = 128  # products of an fp32 sum that the forward pass adds one by one, at most (few.CHAIN has the errors)
PROGRAMS = 4  # a multiprocessor, that sums are split for
CHAIN = 64  # products of fp32 that a thread adds one after the other, about
PARTS = 64  # of a sum, at most: they are added one after the other
WARPS = 4


@dataclass(frozen=True)
class Phases:
    """A tile of the forward pass: pixels of a row by neighbouring outputs, one of each phase."""

    phases: int
    pixels: int
    unroll: int  # source channels

    def describe(self) -> str:
        return f"{self.pixels} pixels x {self.phases} phases, {WARPS} warps"


@dataclass(frozen=True)
class InputColumns:
    """A tile of backward_input: pixels of a row by channels by neighbouring taps of the output's gradient."""

    taps_h: int
    taps_w: int
    pixels: int
    channels: int

    def describe(self) -> str:
        return f"{self.pixels} pixels x {self.channels} channels x {self.taps_h} x {self.taps_w} taps, {WARPS} warps"


def takes(
    direction: str, geometry: Geometry, channels: tuple[int, int], pixels: int, direct: bool, half: bool, width: bool
) -> bool:
    """Whether the kernels take a pass of a problem whose offsets fit into 32 bits.

    Args:
        channels: a group's, of the input and of the output.
        pixels: of the input's whole batch.
        direct: whether the channels are too few for tensor cores.
        half: whether results are rounded to 16 bits.
        width: whether the output's (or its gradient's) pixels along the width are neighbours in memory.
    """
    last, g, (c_in, c_out) = geometry.axes3[2], geometry.groups, channels
    if last.stride < STRIDE or last.kernel < last.stride or not (width or g * max(channels) < LAST_CHANNELS):
        return False
    if prod(geometry.stride) >= 1 << 30:  # phases are counted in 32 bits
        return False
    products = pixels * g * c_in * c_out * geometry.taps
    if not direct and (max(channels) > CHANNELS or prod(geometry.stride) < PHASES or products > PRODUCTS):
        return False
    if direction == "backward_input":
        return True
    if direction == "backward_weight":  # in channels_last the direct kernel's neighbours are channels
        return direct and width
    # Of 21 channels without groups (FCN-32s) the portable kernel took 191 us, this one 312.  With dilation, phases have taps of
    # their own.
    short = half or c_in * prod(a.most_taps for a in geometry.axes) <= SHORT
    return direct and short and all(a.dilation == 1 for a in geometry.axes)


@lru_cache(maxsize=4096)
def choose(
    direction: str, geometry: Geometry, batch: int, c_in: int, c_out: int, size, target: Target
) -> tuple[Phases | InputColumns | WeightColumns, int]:
    """(the tile, into how many parts sums are cut); size is the input's, c_in and c_out are a group's."""
    g, (depth, height, width) = geometry.groups, sizes3(size)
    if direction == "forward":
        phases = power_of_two(prod(geometry.stride), 8, 256)
        axis = geometry.axes3[2]
        row = cdiv(geometry.output_size(size)[-1] + axis.padding, axis.stride)
        return Phases(phases, power_of_two(row, 1, 8), next(n for n in (3, 2, 1) if c_in % n == 0)), 1
    batch = max(batch, 1)  # explain() asks also about an empty one
    pixels = batch * depth * height * width
    tile: InputColumns | WeightColumns
    if direction == "backward_input":
        taps_d, taps_h, taps_w = (a.kernel for a in geometry.axes3)
        box_w = power_of_two(taps_w, 8, 256)
        box_h = power_of_two(taps_h, 1, 256 // box_w)
        tile = InputColumns(box_h, box_w, power_of_two(width, 1, 4), power_of_two(c_in, 1, 8))
        steps = c_out * taps_d * cdiv(taps_h, box_h)
        chain = steps * cdiv(taps_w, box_w)
        programs = g * cdiv(c_in, tile.channels) * batch * depth * height * cdiv(width, tile.pixels)
        elements = g * c_in * pixels
    else:
        columns, channels = c_out * geometry.taps, power_of_two(c_in, 1, 4)
        tile = WeightColumns(power_of_two(columns, 32, 1024 // channels), channels, pixels > CHAIN)
        programs, steps, chain = g * cdiv(c_in, channels) * cdiv(columns, tile.columns), cdiv(pixels, UNROLL), pixels
        elements = g * c_in * columns
    want = max(cdiv(PROGRAMS * target.processors, programs), cdiv(chain, CHAIN))
    return tile, max(1, min(want, steps, PARTS, WORKSPACE_ELEMENTS // elements))
