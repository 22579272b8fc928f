"""The long-stride kernels' tiles (kernels/long.py), and which problems they take: few channels, long kernels and strides.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from .columns import WeightColumns
from .configs import WORKSPACE_ELEMENTS, Target, cdiv, power_of_two
from .geometry import Geometry, sizes3

# Along the width, from so many on: neighbouring threads that took neighbouring pixels would each touch a sector of their own.
STRIDE = 8
CHANNELS = 32  # of a group on either side, at most: beyond, tensor cores have enough to do
PHASES = 64  # from so many on also layers for which tensor cores would do, were not so many of their loads apart
PROGRAMS = 4  # a multiprocessor, that sums are split for
CHAIN = 64  # products of fp32 that a thread adds one after the other, about
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


def takes(direction: str, geometry: Geometry, c_in: int, c_out: int, is_direct: bool, large: bool, width: bool) -> bool:
    """Whether the kernels take a pass.  c_in and c_out are a group's; is_direct: whether they are too few for tensor cores;
    width: whether the output's (or its gradient's) pixels along the width are neighbours in memory."""
    last = geometry.axes3[2]
    if large or last.stride < STRIDE or last.kernel < last.stride:
        return False
    if not is_direct and (max(c_in, c_out) > CHANNELS or prod(geometry.stride) < PHASES):
        return False
    if direction == "forward":  # with dilation, phases have taps of their own
        return all(a.dilation == 1 for a in geometry.axes)
    return direction == "backward_input" or (
        width and is_direct
    )  # a weight's gradient has enough columns for tensor cores


@lru_cache(maxsize=4096)
def choose(
    direction: str, geometry: Geometry, batch: int, c_in: int, c_out: int, size, target: Target
) -> tuple[Phases | InputColumns | WeightColumns, int]:
    """(the tile, into how many parts sums are cut); size is the input's, c_in and c_out are a group's."""
    g, (depth, height, width) = geometry.groups, sizes3(size)
    if direction == "forward":
        phases = power_of_two(prod(geometry.stride), 32, 256)
        axis = geometry.axes3[2]
        row = cdiv(geometry.output_size(size)[-1] + axis.padding, axis.stride)
        return Phases(phases, power_of_two(row, 1, 8), next(n for n in (3, 2, 1) if c_in % n == 0)), 1
    pixels = batch * depth * height * width
    tile: InputColumns | WeightColumns
    if direction == "backward_input":
        taps_w = power_of_two(geometry.axes3[2].kernel, 32, 256)
        tile = InputColumns(256 // taps_w, taps_w, power_of_two(width, 1, 4), power_of_two(c_in, 1, 8))
        steps = c_out * geometry.axes3[0].kernel * cdiv(geometry.axes3[1].kernel, tile.taps_h)
        chain = steps * cdiv(geometry.axes3[2].kernel, taps_w)
        programs = g * cdiv(c_in, tile.channels) * batch * depth * height * cdiv(width, tile.pixels)
        elements = g * c_in * pixels
    else:
        columns, channels = c_out * geometry.taps, power_of_two(c_in, 1, 4)
        tile = WeightColumns(power_of_two(columns, 32, 1024 // channels), channels)
        programs, steps, chain = g * cdiv(c_in, channels) * cdiv(columns, tile.columns), pixels, pixels
        elements = g * c_in * columns
    want = max(cdiv(PROGRAMS * target.processors, programs), cdiv(chain, CHAIN))
    return tile, max(1, min(want, steps, WORKSPACE_ELEMENTS // elements))
