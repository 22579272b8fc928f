"""Deterministic reductions: the second stage of backward_weight and of split gathers, and backward_bias.

They add in float64: long plain sums are where fp32 would lose against torch's cascades, and both kernels wait
for memory.
"""

import triton
import triton.language as tl

from .common import narrow, widen


@triton.jit
def _sum(partial, at, ok, size, splits, to, ROWS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over splits of partial[split, at], where ok, as `to` holds it: a tile [TAPS, BLOCK]; ROWS splits side by side."""
    row = tl.arange(0, ROWS)[:, None, None]
    acc = tl.zeros((ROWS, TAPS, BLOCK), tl.float64)
    for first in range(0, splits, ROWS):
        there = (first + row < splits) & ok[None, :, :]
        acc += tl.load(partial + (first + row) * size + at[None, :, :], mask=there, other=0.0).to(tl.float64)
    return narrow(tl.sum(acc, 0), to.dtype.element_ty)


@triton.jit(do_not_specialize="splits taps columns c_out kh kw g_i g_o g_d g_h g_w".split())
def sum_partials(
    partial, grad, splits, taps, columns, c_out, kh, kw, g_i, g_o, g_d, g_h, g_w,
    DENSE: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad[ci, co, kd, kh, kw] = sum over splits of partial[split, tap, ci, co], ROWS splits side by side.

    A program has TAPS taps of BLOCK columns, the pairs of channels.  DENSE: grad has a pair's taps side by side, one pair after
    the other.
    """
    size = taps.to(tl.int64) * columns
    sets = tl.cdiv(taps, TAPS)
    tap = tl.program_id(0) % sets * TAPS + tl.arange(0, TAPS)
    first = (tl.program_id(0) // sets).to(tl.int64) * BLOCK
    column = first + tl.arange(0, BLOCK)
    ok = (tap < taps)[:, None] & (column < columns)[None, :]
    at = tap.to(tl.int64)[:, None] * columns + column[None, :]
    if DENSE:
        out = column[None, :] * taps + tap[:, None]
    else:
        # Divided in 32 bits: of 64 divisions were most of the kernel's time.
        co = (first % c_out).to(tl.int32) + tl.arange(0, BLOCK)
        of_pair = (first // c_out + co // c_out) * g_i + (co % c_out).to(tl.int64) * g_o
        of_axis = (tap // (kh * kw)).to(tl.int64) * g_d + (tap // kw % kh).to(tl.int64) * g_h
        out = of_pair[None, :] + (of_axis + (tap % kw).to(tl.int64) * g_w)[:, None]
    tl.store(grad + out, _sum(partial, at, ok, size, splits, grad, ROWS, TAPS, BLOCK), mask=ok)


@triton.jit(do_not_specialize=["count", "splits"])
def sum_splits(partial, total, count, splits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """total[i] = sum over splits of partial[split, i], i < count; ROWS splits side by side."""
    size = count.to(tl.int64)
    i = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    tl.store(total + i, _sum(partial, i, i < size, size, splits, total, ROWS, 1, BLOCK), mask=i < size)


@triton.jit(do_not_specialize="images channels pixels per_split".split())
def sum_pixels(
    y, partial, images, channels, pixels, per_split,
    LAST: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[split, channel] = sum of y[image, channel, pixel] over this split's tiles of pixels; LAST: of y[pixel, channel].

    UNROLL tiles are added in ACC before the sum in float64, and their loads are on their way together.  VECTOR divides the
    contiguous axis.
    """
    if LAST:
        channels = channels // VECTOR * VECTOR
    else:
        pixels = pixels // VECTOR * VECTOR
    tiles_n = tl.cdiv(channels, BLOCK_N)
    first_channel = tl.program_id(0) % tiles_n * BLOCK_N
    split = tl.program_id(0) // tiles_n
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    end = tl.minimum((split + 1) * per_split, images * tiles_m)
    m = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    channel_ok = first_channel + c < channels
    if LAST:
        offset = m[:, None] * channels + c[None, :]
    else:
        offset = m[:, None] + c[None, :] * pixels
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for first in range(split * per_split, end, UNROLL):
        some = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for u in tl.static_range(UNROLL):
            tile = tl.minimum(first + u, end - 1)
            pixel = tile % tiles_m * BLOCK_M
            left = tl.where(first + u < end, pixels - pixel, 0)
            if LAST:
                at = pixel.to(tl.int64) * channels + first_channel
            else:
                at = ((tile // tiles_m).to(tl.int64) * channels + first_channel) * pixels + pixel
            v = tl.load(y + at + offset, mask=(m < left)[:, None] & channel_ok[None, :], other=0.0)
            some += widen(v, ACC)
        acc += widen(some, tl.float64)
    tl.store(partial + split.to(tl.int64) * channels + first_channel + c, tl.sum(acc, 0), mask=channel_ok)
