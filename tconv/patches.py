"""The patch kernel's tiles (kernels/patches.py), and which problems it takes: the weight's gradient of layers of few output
channels.

Pure integers, from a problem's sizes; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

from .columns import LEAST_CHANNELS
from .configs import Target, cdiv, power_of_two, splits

# Output channels, and columns, which are (output channel, tap) pairs, of contiguous tensors and of channels_last in fp32, where
# an access of pixels is transposed in registers; measured on an H200 (docs/kernels.md).  In 16 bits one channel may have more
# taps, 75 columns of three lost in channels_last (0.6 times torch's speed), and so did 5 and 8 channels everywhere.
FEW_OUT, FEW_COLUMNS = 3, 48
FEW_OUT_LAST, FEW_COLUMNS_LAST = 2, 32
MOST_COLUMNS = 128
# Pixels of a row, and of the input's whole batch, by whether they have 16 bits: there cuDNN is faster with fewer.  In fp32 it is,
# too, in some of these layers (8x597x48x56 to 2 in channels_last by a tenth), but with TF32's error, or not the same from run to run.
LEAST_WIDTH, LEAST_PIXELS = {True: 12, False: 5}, {True: 1 << 12, False: 256}
MANY_CHANNELS = 256  # of the input, beyond which there are enough tiles of half as many


@dataclass(frozen=True)
class Patches:
    """A tile: pixels of a row by input channels by columns."""

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


def takes(problem, how: str, target: Target) -> bool:
    """Whether the kernel takes a problem (problem.Problem) at a precision."""
    p, taps = problem, problem.geometry.taps
    columns, half = p.c_out * taps, how == "half"
    if p.direction != "backward_weight" or p.geometry.groups > 1 or p.large or taps == 1:
        return False
    if p.c_in < LEAST_CHANNELS or columns > MOST_COLUMNS:
        return False
    if target.backend == "interpreter":  # which has no tensor core to keep busy
        return p.c_out <= FEW_OUT
    if half or p.source == p.destination == "width":
        fits = p.c_out <= FEW_OUT and (columns <= FEW_COLUMNS or (half and p.c_out == 1))
    else:
        fits = p.c_out <= FEW_OUT_LAST and columns <= FEW_COLUMNS_LAST
    fills = p.input_size[-1] >= LEAST_WIDTH[half] and p.pixels >= LEAST_PIXELS[half]
    return fits and fills and target.backend == "cuda" and how in ("half", "tf32", "tf32x3")


def choose(problem, target: Target) -> tuple[Patches, int, int]:
    """The tile, into how many parts the sums over pixels are cut, and how many tiles each has."""
    p, row, columns = problem, problem.input_size[-1], problem.c_out * problem.geometry.taps
    pixels, most, num_warps, num_stages = (64, 64, 8, 3) if p.dtype.itemsize == 2 else (32, 64, 4, 2)
    if p.c_in > MANY_CHANNELS:
        pixels, most, num_warps, num_stages = 64, 32, 4, 2
    pixels, channels = power_of_two(row, 16, pixels), power_of_two(p.c_in, 16, most)
    tile = Patches(pixels, channels, power_of_two(columns, 16, MOST_COLUMNS), num_warps, num_stages)
    tiles = p.pixels // row * cdiv(row, pixels)
    return tile, *splits(tiles, cdiv(p.c_in, channels), p.c_in * columns, pixels, target)
