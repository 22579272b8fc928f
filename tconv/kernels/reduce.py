"""Deterministic reductions: the second stage of backward_weight and of split gathers, and backward_bias.

They add in float64: long plain sums are where fp32 would lose against torch's cascades, and both kernels wait
for memory.
"""

import triton
import triton.language as tl

from .common import known_strides, load_tile, narrow, split_row, widen


@triton.jit
def _sum(partial, i, size, splits, to):
    """The sum over splits of partial[split, i], i < size, in the order of the splits, as `to` holds it."""
    acc = tl.zeros(i.shape, tl.float64)
    for split in range(splits):
        acc += tl.load(partial + split * size + i, mask=i < size, other=0.0).to(tl.float64)
    return narrow(acc, to.dtype.element_ty)


@triton.jit(do_not_specialize="splits taps columns c_out kh kw g_i g_o g_d g_h g_w".split())
def sum_partials(
    partial, grad, splits, taps, columns, c_out, kh, kw, g_i, g_o, g_d, g_h, g_w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad[ci, co, kd, kh, kw] = sum over splits of partial[split, tap, ci, co]."""
    size = taps.to(tl.int64) * columns
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tap = i // columns
    ci = i % columns // c_out
    co = i % c_out
    out = ci * g_i + co * g_o + tap // (kh * kw) * g_d + tap // kw % kh * g_h + tap % kw * g_w
    tl.store(grad + out, _sum(partial, i, size, splits, grad), mask=i < size)


@triton.jit(do_not_specialize=["count", "splits"])
def sum_splits(partial, total, count, splits, BLOCK: tl.constexpr):
    """total[i] = sum over splits of partial[split, i], i < count."""
    size = count.to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + i, _sum(partial, i, size, splits, total), mask=i < size)


@triton.jit(do_not_specialize="batch channels d_out h_out w_out y_n y_c y_d y_h y_w per_split".split())
def sum_pixels(
    y, partial, batch, channels, d_out, h_out, w_out, y_n, y_c, y_d, y_h, y_w, per_split,
    Y_LAYOUT: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """partial[split, channel] = sum of y over this split's range of pixel tiles."""
    ROWS: tl.constexpr = BLOCK_M // BOX_W
    y_n, y_c, y_d, y_h, y_w = known_strides(y_n, y_c, y_d, y_h, y_w, Y_LAYOUT)
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    split = tl.program_id(0) // tiles_n
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_ok = channel < channels
    rows = batch * d_out * h_out
    c = channel
    if LARGE:
        rows = batch.to(tl.int64) * d_out * h_out
        c = channel.to(tl.int64)
    tiles_w = tl.cdiv(w_out, BOX_W)
    tiles = tl.cdiv(rows, ROWS).to(tl.int32) * tiles_w
    m = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        tile_r = tile // tiles_w
        row = tile_r * ROWS + m // BOX_W
        w = tile % tiles_w * BOX_W + m % BOX_W
        if LARGE:
            row = tile_r.to(tl.int64) * ROWS + m // BOX_W
            w = w.to(tl.int64)
        n, d, h = split_row(row, d_out, h_out)
        ok = (row < rows) & (w < w_out)
        v = load_tile(y, n * y_n + d * y_d + h * y_h + w * y_w, c * y_c, ok[:, None] & channel_ok[None, :], Y_LAYOUT)
        acc += widen(v, tl.float64)
    tl.store(partial + split.to(tl.int64) * channels + channel, tl.sum(acc, 0), mask=channel_ok)
