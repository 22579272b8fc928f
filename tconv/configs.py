"""Tile configurations: one validity predicate and one deterministic heuristic for each kernel family."""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import dataclass
from functools import cache

from . import geometry

# fp32 elements of workspace that a pass may take for its partial sums (64 Mi = 256 MB): users of
# cuDNN complain of workspaces of 4.7 to 48 GiB.  One split always fits, whatever the weight's size.
WORKSPACE_ELEMENTS = 1 << 26

# TF32 values that an fp32 operand becomes where it is copied or packed for a precision.
PARTS = {"tf32": 1, "tf32x3": 2}


@dataclass(frozen=True)
class Target:
    """What a configuration may depend on of the device."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int  # compute capability as 90 for 9.0, or the digits of gfx942; 0 where there is none
    processors: int  # multiprocessors
    triton: tuple[int, int] = (3, 6)  # major and minor version
    without: tuple[str, ...] = ()  # the families that are not to be chosen
    fault: str = ""  # of the Hopper kernels, as the probe found it (probe.fault)

    @property
    def is_hopper(self) -> bool:
        return (self.backend, self.arch) == ("cuda", 90)


class Tile:
    """What a kernel is compiled for, as one object.  Triton's cache on disk, which knows of a kernel its own code, knows it by its
    `cache_key`: its fields, and the code of the properties that the kernel reads."""

    @property
    def cache_key(self) -> str:
        return f"{self!r} {_code_behind(type(self).__module__)}"


@cache
def _code_behind(module: str) -> str:
    """A digest of a module's code and of what tiles' properties use besides."""
    sources = (inspect.getsource(sys.modules[name]) for name in (module, __name__, geometry.__name__))
    return hashlib.sha256("".join(sources).encode()).hexdigest()


@dataclass(frozen=True)
class Config:
    """A tile: BLOCK_M x BLOCK_N x BLOCK_K, its pixels laid out as rows of `box_w` along the width."""

    block_m: int
    block_n: int
    block_k: int
    box_w: int
    num_warps: int
    num_stages: int

    def describe(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k}, rows of {self.box_w}, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


def is_valid(config: Config, pixels: int, element_size: int) -> bool:
    """Whether a GEMM configuration compiles and fits every GPU served; `pixels` is the axis that counts pixels."""
    blocks = (config.block_m, config.block_n, config.block_k)
    shared = config.num_stages * (config.block_m + config.block_n) * config.block_k * element_size
    return (
        all(16 <= b <= 256 and b & (b - 1) == 0 for b in blocks)
        and config.box_w & (config.box_w - 1) == 0
        and config.box_w <= pixels
        and config.num_warps in (1, 2, 4, 8)
        and shared <= 99 * 1024  # the smallest limit of the targets: sm_86 and sm_89
    )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that is at least n, held between `least` and `most`."""
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))


def box_width(rows: int, width: int, pixels: int) -> int:
    """How many of a tile's pixels lie side by side: few classes, so that sizes share compiled kernels.

    The padded area decides; narrow boxes pay for shorter runs of contiguous addresses.
    """

    def cost(box):
        padded = cdiv(width, box) * box * cdiv(rows, pixels // box) * (pixels // box)
        return padded * (1.0 if box >= 16 else 1.15 if box == 4 else 1.3), -box

    return min((b for b in {1, 4, 16, 64, pixels} if b <= pixels), key=cost)


def reduction_block(element_size: int, vectors: bool, target: Target) -> int:
    """The most of BLOCK_K.  A 16-bit tile that is not whole vectors of channels is loaded through registers (asynchronous
    copies take 4 bytes at least).  A tile of 64 would spill them before sm_90, and for sm_100 under Triton 3.8, whose
    assembler keeps to 96 registers there."""
    through_registers = element_size == 2 and not vectors and target.backend == "cuda" and target.arch // 10 != 9
    return 64 if element_size == 2 and not through_registers else 32


def gather_gemm(
    rows: int,
    width: int,
    programs: int,
    c_src: int,
    c_dst: int,
    element_size: int,
    precision: str,
    vectors: bool,
    large: bool,
    target: Target,
) -> Config:
    """Tile for one phase of `rows` x `width` pixels; `programs` counts phases times groups."""
    block_n = power_of_two(c_dst, 16, 64 if precision in ("tf32x3", "ieee") else 128)
    block_k = power_of_two(c_src, 16, reduction_block(element_size, vectors, target))
    block_m = 128
    if cdiv(rows * width, 128) * programs * cdiv(c_dst, block_n) < target.processors:
        block_m = 64  # fill the GPU before the tile
    wide = block_m * block_n >= 128 * 128 or (precision in ("tf32x3", "ieee") and block_m * block_n >= 8192)
    warps = 8 if wide or large else 4  # 64-bit offsets take the registers of four warps more
    return Config(
        block_m, block_n, block_k, box_width(rows, width, block_m), warps, 3 if block_k <= 32 or block_n <= 64 else 2
    )


LEAST_STEPS = 8  # along K: a program with fewer would spend its time on beginning and ending


def gather_splits(programs: int, steps: int, elements: int, target: Target) -> int:
    """Into how many parts a gather of `elements` cuts its sums of so many steps, so that a small grid fills the GPU."""
    if programs >= target.processors:
        return 1
    want = cdiv(2 * target.processors, max(1, programs))
    return max(1, min(want, steps // LEAST_STEPS, WORKSPACE_ELEMENTS // max(1, elements)))


def weight_gemm(
    rows: int,
    width: int,
    c_in: int,
    c_out: int,
    element_size: int,
    precision: str,
    vectors: bool,
    target: Target,
) -> Config:
    most = 64 if precision in ("tf32x3", "ieee") else 128
    block_m = power_of_two(c_in, 16, most)
    block_n = power_of_two(c_out, 16, most)
    block_k = reduction_block(element_size, vectors, target)
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    return Config(
        block_m, block_n, block_k, box_width(rows, width, block_k), warps, 3 if block_m * block_n < 128 * 128 else 2
    )


def direct(rows: int, width: int, channels: int, channels_last: bool, target: Target) -> Config:
    """Direct kernels: channels_last takes a few pixels of many channels, NCHW many pixels of one.

    The interpreter pays by the program, so there a program takes many channels always.
    """
    if channels_last or target.backend == "interpreter":
        block_n = power_of_two(channels, 1, 64)
        block_m = max(16, 512 // block_n)
    else:
        block_n, block_m = 1, 256
    return Config(block_m, block_n, 1, box_width(rows, width, block_m), 4, 2)


# Pixels that a weight's gradient adds up in one fp32 accumulator: a tensor core truncates as it accumulates, and after 32768 that had become half
# of TF32's own rounding error (DBNet's last layer).
MOST_SUM = 8192


def splits(tiles: int, programs: int, elements: int, block: int, target: Target) -> tuple[int, int]:
    """(splits, pixel tiles a split) for a reduction over `tiles` pixel tiles of `block` pixels.

    Four programs a multiprocessor at least, to fill the GPU; and no fp32 accumulator runs over more than MOST_SUM pixels where
    the workspace allows.
    """
    want = max(cdiv(4 * target.processors, programs), cdiv(tiles * block, MOST_SUM))
    tiles = max(tiles, 1)  # explain() asks also about an empty batch
    count = max(1, min(want, tiles, WORKSPACE_ELEMENTS // elements))
    per_split = cdiv(tiles, count)
    return cdiv(tiles, per_split), per_split


@dataclass(frozen=True)
class PixelSums:
    """How the sums over pixels of each channel are cut: tiles of block_m pixels by block_n channels."""

    block_m: int
    block_n: int
    splits: int
    tiles_per_split: int  # a multiple of unroll
    unroll: int


def pixel_sums(images: int, channels: int, pixels: int, channels_last: bool, target: Target) -> PixelSums:
    """Eight elements a thread, eight programs a multiprocessor.  In channels_last all images are one."""
    block_n = power_of_two(channels, 1, 64) if channels_last or target.backend == "interpreter" else 1
    block_m = power_of_two(pixels, 16, max(16, 1024 // block_n))
    # Loads of single elements, each with a mask of its own, have no registers for more.
    unroll = 2 if (channels if channels_last else pixels) % 4 else 8
    tiles = images * cdiv(pixels, block_m)
    want = min(
        cdiv(8 * target.processors, cdiv(channels, block_n)), cdiv(tiles, unroll), WORKSPACE_ELEMENTS // channels
    )
    per_split = cdiv(cdiv(tiles, max(1, want)), unroll) * unroll
    return PixelSums(block_m, block_n, cdiv(tiles, per_split), per_split, unroll)
