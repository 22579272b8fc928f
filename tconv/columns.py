"""The column kernels' tiles (kernels/columns.py), and which problems they take: those that are mostly reading the weight, or
writing its gradient, and forward passes of few output channels.

Pure integers, from a layer's sizes; neither torch nor Triton.  The times are estimates for an H100, two to four times below
what was measured (docs/kernels.md), as are those that they are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .configs import WORKSPACE_ELEMENTS, Target, cdiv, power_of_two

MOST_PIXELS = 384  # of all samples; beyond, multiplications take the time, and other kernels' tiles are better for them
MOST_PRODUCTS = 3 << 29  # with 3.3e9 (200 pixels, 1536 to 768 channels, k14) the shift kernel took 119 us, this one 150
LEAST_CHANNELS = 32  # of a group: a tile's depth
LEAST_WEIGHT = 1 << 15  # bytes; below, a pass is nothing but launches
LESS = 0.9  # of what the other kernels would take at least
RUN = 4  # input pixels along the width, from which on neighbouring outputs find their products in neighbouring pixels
SPLITS = (1, 2, 4, 8, 16)  # each is another kernel to compile
ROW = 64  # outputs of one phase, or channels, from which on a program adds whole rows of them

# Nanoseconds, and bytes a nanosecond.
START = 2000  # a launch: begin, wait for the first loads, end
MEMORY = 2800
L2 = 5000
STREAM = 40  # one program: the loads that it has on their way at a time, 50 KB, over their latency
RESIDENT = 2  # programs a multiprocessor, on which the shared memory decides


@dataclass(frozen=True)
class Columns:
    """A tile of the GEMM, and of the sums how many outputs a program adds."""

    columns: int
    pixels: int
    channels: int
    outputs: int
    num_warps: int
    num_stages: int

    def describe(self) -> str:
        return (
            f"{self.columns} columns x {self.pixels} pixels x {self.channels} channels, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


def refuse(groups: int, c_in: int, columns: int, pixels: int, element_size: int, large: bool, order: str) -> str:
    """Why the kernels do not take a forward pass, or "".  c_in and columns (output channels times taps) are a group's,
    pixels those of the input's whole batch, order that of the weight in memory."""
    for bad, why in (
        (order == "strided", "the column kernels read a weight without gaps"),
        (large, "the column kernels have 32-bit offsets"),
        (
            pixels > MOST_PIXELS or pixels * groups * c_in * columns > MOST_PRODUCTS,
            "too many pixels for the column kernels",
        ),
        (c_in < LEAST_CHANNELS, "too few input channels for the column kernels"),
        (groups * c_in * columns * element_size < LEAST_WEIGHT, "the weight is too small for the column kernels"),
        (groups * columns * pixels > WORKSPACE_ELEMENTS, "the columns would take too much memory"),
    ):
        if bad:
            return why
    return ""


@lru_cache(maxsize=4096)
def choose(
    groups: int, c_in: int, columns: int, pixels: int, element_size: int, target: Target
) -> tuple[Columns, int, float]:
    """(the tile, into how many parts the sums over input channels are cut, nanoseconds by the estimate)."""
    pixels_most = 64 if element_size == 2 else 32  # wgmma would take 64 fp32 ones, and a weight that threads transpose
    block_m, block_n = power_of_two(pixels, 16, pixels_most), power_of_two(columns, 16, 128)
    block_k, stages = _depth(c_in, element_size, target)
    stage = (block_m + block_n) * block_k * element_size
    weight = groups * c_in * columns * element_size
    steps, whole = cdiv(c_in, block_k), groups * cdiv(columns, block_n) * cdiv(pixels, block_m)

    def cost(splits: int) -> float:
        rounds = cdiv(whole * splits, RESIDENT * target.processors)
        streamed = rounds * cdiv(steps, splits) * stage
        partials = 4 * splits * groups * columns * pixels
        return 2 * START + max(weight / MEMORY, whole * steps * stage / L2, streamed / STREAM) + 2 * partials / L2

    fits = [n for n in SPLITS if n == 1 or (n <= steps and n * groups * columns * pixels <= WORKSPACE_ELEMENTS)]
    splits = min(fits, key=cost)
    outputs = 4096 if target.backend == "interpreter" else 256  # the interpreter pays by the program
    return Columns(block_n, block_m, block_k, outputs, 4, stages), splits, cost(splits)


def _depth(c_in: int, element_size: int, target: Target) -> tuple[int, int]:
    """(input channels of a step, stages): four stages are within what a block has of shared memory on sm_86 and sm_89, two
    within AMD's."""
    return power_of_two(c_in, 16, 64 if element_size == 2 else 32), 2 if target.backend == "hip" else 4


def measured(time: float, pixels: int, element_size: int) -> float:
    """What a call takes where `choose` estimates `time`, by what an H200 took for layers of 16 to 256 pixels."""
    return time * (1.7 if pixels <= 16 else 2.33 if element_size == 2 else 2.7)


def packed(weight: int, streamed: int, splits: int) -> float:
    """Nanoseconds that a gather with a packed weight of so many bytes takes at least: the weight is read, written and
    read, and a program reads so many bytes; sums in parts are another launch."""
    return (2 + (splits > 1)) * START + 2 * weight / MEMORY + max(weight / MEMORY, streamed / STREAM)


# The forward pass of few output channels: all taps of all of them are the columns of one product, which reads the input once.
FEW_OUT = 3
# One tile's; as many multiplications of zeros as products take the time beyond, and with tf32x3 sooner.
LEAST_COLUMNS, FEW_COLUMNS, FEW_COLUMNS_TF32X3 = 16, 128, 64
FEW_PIXELS = 64  # of a tile
MANY_TAPS = 64  # from which on other kernels' products take longer than columns to write and read (k9)


def of_few(
    c_in: int, c_out: int, taps: int, pixels: int, element_size: int, how: str, large: bool, order: str, last: bool,
    target: Target,
) -> Columns | None:  # fmt: skip
    """The tile for a layer of few output channels and no groups, or None.  pixels are those of the input's whole batch, how
    the precision, order that of the weight in memory, last whether the output is channels_last."""
    columns = c_out * taps
    if large or order == "strided" or (how == "ieee" and target.backend != "interpreter"):
        return None
    if c_out > FEW_OUT or not LEAST_COLUMNS <= columns <= (FEW_COLUMNS_TF32X3 if how == "tf32x3" else FEW_COLUMNS):
        return None
    if c_in < LEAST_CHANNELS or pixels <= MOST_PIXELS or pixels * columns > WORKSPACE_ELEMENTS:
        return None
    # What is written and read again must be little beside the input, as on an H200 (docs/kernels.md).
    if taps >= MANY_TAPS:
        most = c_in * element_size * 3 // 4
    elif how == "tf32x3":
        most = c_in * 3 // 4
    else:
        most = c_in // 8 if last else c_in * 3 // 4 if element_size == 2 else c_in // 2
    if columns > most:
        return None
    block_k, stages = _depth(c_in, element_size, target)
    tile = Columns(power_of_two(columns, 16, FEW_COLUMNS), FEW_PIXELS, block_k, 512, 4, stages)
    if how == "tf32x3":
        return replace(tile, pixels=FEW_PIXELS // 2)
    # At TF32 tiles are wide where two programs a multiprocessor have them, since a weight that is rounded takes long to read.
    wide = 4 * FEW_PIXELS
    if how == "tf32" and pixels >= 2 * target.processors * wide:
        return replace(tile, pixels=wide, num_warps=8, num_stages=2)
    # With few steps, room for more programs is better than stages.
    return replace(tile, num_stages=2) if c_in <= 2 * block_k else tile


# The gradient of the weight.
UNROLL = 4  # pixels whose loads are on their way together
SHORT = 40  # fp32 sums of fewer pixels have no tensor core to go to (problem.IEEE_PRODUCTS)
# And of 16-bit ones: at 4 cuDNN's product between copies is as fast (31 us, in channels_last 14 without them).
FEW_HALVES = 2


@dataclass(frozen=True)
class WeightColumns:
    """A tile of a weight's gradient."""

    columns: int
    channels: int
    blocks: bool = False  # whether sums are long enough to be added up in float64, a block of pixels at a time

    def describe(self) -> str:
        return f"{self.channels} input channels x {self.columns} columns"


def of_weight(
    groups: int, c_in: int, columns: int, pixels: int, activations: int, element_size: int, large: bool
) -> WeightColumns | None:
    """The tile, or None where writing the weight is not most of the problem, or products are too many.

    c_in and columns (output channels times taps) are a group's, pixels those of the input's whole batch, activations the
    elements of the input and of the output's gradient.
    """
    weight = groups * c_in * columns
    few = pixels <= FEW_HALVES if element_size == 2 else pixels < SHORT
    if large or not few or weight < activations or weight * element_size < LEAST_WEIGHT:
        return None
    return WeightColumns(power_of_two(columns, 16, 256), power_of_two(c_in, 4, 16))
