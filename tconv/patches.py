"""The patch kernels' tiles (kernels/patches.py), and which problems they take: gradients of layers of few output channels.

Pure integers, from a layer's sizes; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

from .columns import FEW_COLUMNS, FEW_COLUMNS_TF32X3, FEW_OUT, LEAST_CHANNELS
from .configs import Target, cdiv, power_of_two, splits

LEAST_WIDTH = 12  # a tile has at least 16 pixels of a row
LEAST_PIXELS = 1 << 12  # of the input's whole batch, to fill the GPU


@dataclass(frozen=True)
class Patches:
    """A tile: pixels of a row by input channels by columns, which are (output channel, tap) pairs."""

    pixels: int
    channels: int
    columns: int
    num_warps: int
    num_stages: int

    def describe(self) -> str:
        return (
            f"{self.pixels} pixels x {self.channels} channels x {self.columns} columns, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


def takes(c_in: int, c_out: int, taps: int, width: int, pixels: int, how: str, large: bool, target: Target) -> bool:
    """Whether the kernels take a gradient of a layer without groups.  width: of a row of the input, whose whole batch has
    so many pixels; how: the precision."""
    columns = FEW_COLUMNS_TF32X3 if how == "tf32x3" else FEW_COLUMNS
    fits = c_out <= FEW_OUT and taps > 1 and c_out * taps <= columns and c_in >= LEAST_CHANNELS
    fills = width >= LEAST_WIDTH and pixels >= LEAST_PIXELS
    interpreter = target.backend == "interpreter"  # which has no tensor core to keep busy
    return not large and fits and (interpreter or (fills and how != "ieee"))


def of_input(c_in: int, columns: int, width: int) -> Patches:
    """backward_input's tile: a thread has 8 to 16 elements of each matrix, since each has its own address (with 64 pixels, 128
    channels and four warps 70 to 250 bytes of spills)."""
    pixels, channels = power_of_two(width, 16, 64), power_of_two(c_in, 16, 64)
    return Patches(pixels, channels, power_of_two(columns, 16, 32), 8 if pixels == channels == 64 else 4, 2)


def of_weight(c_in: int, columns: int, rows: int, width: int, target: Target) -> tuple[Patches, int, int]:
    """backward_weight's tile, into how many parts its sums over pixels are cut, and how many tiles each has."""
    pixels, channels = power_of_two(width, 16, 32), power_of_two(c_in, 16, 64)
    block = power_of_two(columns, 16, FEW_COLUMNS)
    # With four warps and 64 pixels Triton 3.6 spilled 90 to 350 bytes.
    tile = Patches(pixels, channels, block, 8 if channels * block >= 64 * 64 else 4, 2)
    return tile, *splits(rows * cdiv(width, pixels), cdiv(c_in, channels), c_in * columns, pixels, target)
