"""The weight's gradient of layers of few output channels: a product of the input with patches of the output's gradient (im2col).

All taps of all output channels are one dimension of one product, so that what is large, the input, is read once; other
kernels take a tap at a time, of which a tensor core's tile is mostly padding.
"""

import triton
import triton.language as tl

from .common import (
    inside,
    kernel_name,
    known_channels,
    known_strides,
    load_tile,
    matmul,
    operand,
    split_row,
)


@triton.jit
def _columns(c_out, kh, kw, taps, y_c, y_d, y_h, y_w, dild, dilh, dilw, BLOCK: tl.constexpr):
    """Of columns: (whether they are, channel, tap, where in a patch along each axis, offset)."""
    column = tl.arange(0, BLOCK)
    co = column // taps
    tap = column % taps
    td = tap // (kh * kw) * dild
    th = tap // kw % kh * dilh
    tw = tap % kw * dilw
    return co < c_out, co, tap, td, th, tw, co * y_c + td * y_d + th * y_h + tw * y_w


@triton.jit
def _patches(
    y, offset, ok, td, th, tw, n, d, h, ow, d_out, h_out, w_out, strided, strideh, padd, padh, y_n, y_d, y_h, y_w
):  # fmt: skip
    """[pixels of a row, columns] of the output's gradient; ow: where pixels' first taps are along the width."""
    od = d * strided - padd
    oh = h * strideh - padh
    ok = ok & inside(od + td, d_out) & inside(oh + th, h_out)
    ok = ok[None, :] & inside(ow[:, None] + tw[None, :], w_out)
    of_row = y + (n * y_n + od * y_d + oh * y_h)
    return tl.load(of_row + (ow * y_w)[:, None] + offset[None, :], mask=ok, other=0.0)


SCALARS = (
    "batch c_in c_out d_in h_in w_in d_out h_out w_out kh kw taps strided strideh stridew padd padh padw dild dilh dilw "
    "x_n x_c x_d x_h x_w y_n y_c y_d y_h y_w"
).split()


@triton.jit(
    repr=kernel_name("tconv_patch_weight"), do_not_specialize=[*SCALARS, "of_channel", "of_tap", "per_split", "count"]
)
def patch_weight(
    y, x, grad, batch, c_in, c_out, d_in, h_in, w_in, d_out, h_out, w_out,
    kh, kw, taps, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, of_channel, of_tap, per_split, count,
    X_LAYOUT: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad[split, ci, column] = sum over the split's tiles of pixels of x * y, in the order in which the weight lies: the
    columns of channels and of taps are of_channel and of_tap apart.  Results of splits lie count apart.

    GEMM: M = input channels, N = columns, K = pixels of one row of the input.  VECTOR: where pixels lie side by side, a power
    of two that divides x's address, its other strides and its width.
    """
    x_n, x_c, x_d, x_h, x_w = known_strides(x_n, x_c, x_d, x_h, x_w, X_LAYOUT)
    c_in = known_channels(c_in, X_LAYOUT)
    if X_LAYOUT == "width":
        x_n, x_c, x_d, x_h = (
            x_n // VECTOR * VECTOR,
            x_c // VECTOR * VECTOR,
            x_d // VECTOR * VECTOR,
            x_h // VECTOR * VECTOR,
        )
        w_in = w_in // VECTOR * VECTOR
    tiles_m = tl.cdiv(c_in, BLOCK_M)
    tiles_w = tl.cdiv(w_in, BLOCK_K)
    tiles = batch * d_in * h_in * tiles_w
    split = tl.program_id(0) // tiles_m
    ci = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ok, co, tap, td, th, tw, offset = _columns(c_out, kh, kw, taps, y_c, y_d, y_h, y_w, dild, dilh, dilw, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        w = tile % tiles_w * BLOCK_K + tl.arange(0, BLOCK_K)
        n, d, h = split_row(tile // tiles_w, d_in, h_in)
        inner = w < w_in
        ow = tl.where(inner, w * stridew - padw, -(1 << 30))  # outside: an infinity there is no part of the sum
        a = load_tile(
            x, n * x_n + d * x_d + h * x_h + w * x_w, ci * x_c, inner[:, None] & (ci < c_in)[None, :], X_LAYOUT
        )
        b = _patches(
            y, offset, ok, td, th, tw, n, d, h, ow, d_out, h_out, w_out, strided, strideh, padd, padh, y_n, y_d, y_h, y_w
        )  # fmt: skip
        acc = matmul(tl.trans(operand(a, PRECISION)), operand(b, PRECISION), acc, PRECISION)

    at = co * of_channel + tap * of_tap
    out = grad + split.to(tl.int64) * count + (ci.to(tl.int64) * (c_out * taps))[:, None] + at[None, :]
    tl.store(out, acc.to(grad.dtype.element_ty), mask=(ci < c_in)[:, None] & ok[None, :])
