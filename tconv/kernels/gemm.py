"""Implicit GEMM on the tensor cores: the portable kernels for every dense and wide-group layer."""

import triton
import triton.language as tl

from .common import (
    GATHER_SCALARS,
    WEIGHT_SCALARS,
    axis_taps,
    inside,
    kernel_name,
    known_channels,
    known_strides,
    load_tile,
    matmul,
    operand,
    split_row,
    split_tap,
    store_tile,
)


@triton.jit(repr=kernel_name("tconv_gather_gemm"), do_not_specialize=[*GATHER_SCALARS, "splits", "dst_split"])
def gather_gemm(
    src, packed, bias, dst,
    batch, c_src, c_dst,  # channels are those of one group
    d_src, h_src, w_src, d_dst, h_dst, w_dst,
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    gcdd, gcdh, gcdw, invd, invh, invw,
    src_n, src_c, src_d, src_h, src_w, dst_n, dst_c, dst_d, dst_h, dst_w, splits, dst_split,
    FORWARD: tl.constexpr, SRC_LAYOUT: tl.constexpr, DST_LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_C: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """dst[n, co, q*phases + a] = bias[co] + sum over taps of phase a and over ci of src * weight.

    Implicit GEMM: M = destination pixels of one phase (rows of BOX_W pixels), N = destination
    channels of one group, K = taps of the phase times source channels.  `packed` is the weight as
    [group, tap, c_dst, c_src], zero-padded to whole tiles.  Each of `splits` adds a part of the steps along K and
    writes it dst_split elements behind the one before; the first adds the bias.
    """
    ROWS: tl.constexpr = BLOCK_M // BOX_W
    src_n, src_c, src_d, src_h, src_w = known_strides(src_n, src_c, src_d, src_h, src_w, SRC_LAYOUT)
    dst_n, dst_c, dst_d, dst_h, dst_w = known_strides(dst_n, dst_c, dst_d, dst_h, dst_w, DST_LAYOUT)
    c_src = known_channels(c_src, SRC_LAYOUT)
    c_dst = known_channels(c_dst, DST_LAYOUT)
    phases_d = strided if FORWARD else 1
    phases_h = strideh if FORWARD else 1
    phases_w = stridew if FORWARD else 1
    mult_d = 1 if FORWARD else strided
    mult_h = 1 if FORWARD else strideh
    mult_w = 1 if FORWARD else stridew
    q_d = (d_dst + phases_d - 1) // phases_d
    q_h = (h_dst + phases_h - 1) // phases_h
    q_w = (w_dst + phases_w - 1) // phases_w
    tiles_n = tl.cdiv(c_dst, BLOCK_N)
    tiles_w = tl.cdiv(q_w, BOX_W)
    rows = batch * q_d * q_h
    if LARGE:
        rows = batch.to(tl.int64) * q_d * q_h
    tiles_r = tl.cdiv(rows, ROWS).to(tl.int32)

    # Programs that share source pixels (channel tiles, then phases) are neighbours, for the L2.
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    pid = pid // tiles_n
    split = pid % splits
    pid = pid // splits
    # A stride beyond the output's size has phases without outputs.
    used_d = tl.minimum(phases_d, d_dst)
    used_h = tl.minimum(phases_h, h_dst)
    used_w = tl.minimum(phases_w, w_dst)
    phase_w = pid % used_w
    pid = pid // used_w
    phase_h = pid % used_h
    pid = pid // used_h
    phase_d = pid % used_d
    pid = pid // used_d
    tile_w = pid % tiles_w
    pid = pid // tiles_w
    tile_r = pid % tiles_r
    group = pid // tiles_r

    first_d, tap_step_d, count_d, off_d, step_d = axis_taps(phase_d, kd, strided, padd, dild, gcdd, invd, FORWARD)
    first_h, tap_step_h, count_h, off_h, step_h = axis_taps(phase_h, kh, strideh, padh, dilh, gcdh, invh, FORWARD)
    first_w, tap_step_w, count_w, off_w, step_w = axis_taps(phase_w, kw, stridew, padw, dilw, gcdw, invw, FORWARD)

    m = tl.arange(0, BLOCK_M)
    row = tile_r * ROWS + m // BOX_W
    qw = tile_w * BOX_W + m % BOX_W
    if LARGE:
        row = tile_r.to(tl.int64) * ROWS + m // BOX_W
        qw = qw.to(tl.int64)
    n, qd, qh = split_row(row, q_d, q_h)
    row_ok = row < rows
    id0 = (qd * mult_d + off_d).to(tl.int32)
    ih0 = (qh * mult_h + off_h).to(tl.int32)
    iw0 = (qw * mult_w + off_w).to(tl.int32)
    if LARGE:
        pixel = n * src_n + id0.to(tl.int64) * src_d + ih0.to(tl.int64) * src_h + iw0.to(tl.int64) * src_w
    else:
        pixel = n * src_n + id0 * src_d + ih0 * src_h + iw0 * src_w
    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(c_src, BLOCK_K)
    tiles_total = tiles_n * BLOCK_N
    width = blocks * BLOCK_K  # a packed row
    co = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    taps_all = kd * kh * kw
    packed_row = packed + (group.to(tl.int64) * taps_all * tiles_total + co)[:, None] * width + k[None, :]
    group_c = group * c_src
    if LARGE:
        group_c = group.to(tl.int64) * c_src
    src_base = src + group_c * src_c

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    steps = count_d * count_h * count_w * blocks
    per_split = tl.cdiv(steps, splits)
    for i in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        block = i % blocks
        jd, jh, jw = split_tap(i // blocks, count_h, count_w)
        tap = ((first_d + jd * tap_step_d) * kh + first_h + jh * tap_step_h) * kw + first_w + jw * tap_step_w
        dd = jd * step_d
        dh = jh * step_h
        dw = jw * step_w
        ok = row_ok & inside(id0 + dd, d_src) & inside(ih0 + dh, h_src) & inside(iw0 + dw, w_src)
        if LARGE:
            delta = dd.to(tl.int64) * src_d + dh.to(tl.int64) * src_h + dw.to(tl.int64) * src_w
            c = (block * BLOCK_K + k).to(tl.int64)
        else:
            delta = dd * src_d + dh * src_h + dw * src_w
            c = block * BLOCK_K + k
        if EVEN_C:
            mask = ok[:, None] & (k >= 0)[None, :]
        else:
            mask = ok[:, None] & (c < c_src)[None, :]
        a = load_tile(src_base, pixel + delta, c * src_c, mask, SRC_LAYOUT)
        b = tl.load(packed_row + tap.to(tl.int64) * tiles_total * width + block * BLOCK_K)
        if PRECISION == "widen":
            b = b.to(tl.float32)
        acc = matmul(operand(a, PRECISION), tl.trans(b), acc, PRECISION)

    co_ok = co < c_dst
    channel = group * c_dst + co
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=co < tl.where(split == 0, c_dst, 0), other=0.0).to(ACC)[None, :]
    od = qd * phases_d + phase_d
    oh = qh * phases_h + phase_h
    ow = qw * phases_w + phase_w
    ok = row_ok & (od < d_dst) & (oh < h_dst) & (ow < w_dst)
    if LARGE:
        channel = channel.to(tl.int64)
    out = n * dst_n + od * dst_d + oh * dst_h + ow * dst_w
    part = dst + split.to(tl.int64) * dst_split
    store_tile(part, out, channel * dst_c, acc, ok[:, None] & co_ok[None, :], DST_LAYOUT)


@triton.jit(
    repr=kernel_name("tconv_weight_gemm"),
    do_not_specialize=WEIGHT_SCALARS,
)
def weight_gemm(
    x, y, partial,
    batch, c_in, c_out, groups,  # channels are those of one group
    d_in, h_in, w_in, d_out, h_out, w_out,
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w,
    per_split,
    X_LAYOUT: tl.constexpr, Y_LAYOUT: tl.constexpr,
    LARGE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """partial[split, tap, ci, co] = sum over this split's input pixels of x[ci] * y[co], y = grad_output.

    GEMM a tap: M = input channels and N = output channels of one group, K = input pixels.  Each split
    sums a fixed range of pixel tiles, so that the result is the same from run to run.
    """
    ROWS: tl.constexpr = BLOCK_K // BOX_W
    x_n, x_c, x_d, x_h, x_w = known_strides(x_n, x_c, x_d, x_h, x_w, X_LAYOUT)
    y_n, y_c, y_d, y_h, y_w = known_strides(y_n, y_c, y_d, y_h, y_w, Y_LAYOUT)
    c_in = known_channels(c_in, X_LAYOUT)
    c_out = known_channels(c_out, Y_LAYOUT)
    tiles_m = tl.cdiv(c_in, BLOCK_M)
    tiles_n = tl.cdiv(c_out, BLOCK_N)
    taps = kd * kh * kw
    # Taps are neighbours: they read the same x and overlapping y.
    pid = tl.program_id(0)
    tap = pid % taps
    pid = pid // taps
    tile_n = pid % tiles_n
    pid = pid // tiles_n
    tile_m = pid % tiles_m
    pid = pid // tiles_m
    group = pid % groups
    split = pid // groups

    off_d = tap // (kh * kw) * dild - padd
    off_h = tap // kw % kh * dilh - padh
    off_w = tap % kw * dilw - padw
    ci = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    co = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ci_ok = ci < c_in
    co_ok = co < c_out
    x_channel = group * c_in + ci
    y_channel = group * c_out + co
    rows = batch * d_in * h_in
    if LARGE:
        rows = batch.to(tl.int64) * d_in * h_in
        x_channel = x_channel.to(tl.int64)
        y_channel = y_channel.to(tl.int64)
    tiles_w = tl.cdiv(w_in, BOX_W)
    tiles = tl.cdiv(rows, ROWS).to(tl.int32) * tiles_w
    k = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        tile_r = tile // tiles_w
        row = tile_r * ROWS + k // BOX_W
        iw = tile % tiles_w * BOX_W + k % BOX_W
        if LARGE:
            row = tile_r.to(tl.int64) * ROWS + k // BOX_W
            iw = iw.to(tl.int64)
        n, id_, ih = split_row(row, d_in, h_in)
        x_ok = (row < rows) & (iw < w_in)
        od = id_ * strided + off_d
        oh = ih * strideh + off_h
        ow = iw * stridew + off_w
        y_ok = x_ok & (od >= 0) & (od < d_out) & (oh >= 0) & (oh < h_out) & (ow >= 0) & (ow < w_out)
        x_pixel = n * x_n + id_ * x_d + ih * x_h + iw * x_w
        y_pixel = n * y_n + od * y_d + oh * y_h + ow * y_w
        a = load_tile(x, x_pixel, x_channel * x_c, y_ok[:, None] & ci_ok[None, :], X_LAYOUT)
        b = load_tile(y, y_pixel, y_channel * y_c, y_ok[:, None] & co_ok[None, :], Y_LAYOUT)
        acc = matmul(tl.trans(operand(a, PRECISION)), operand(b, PRECISION), acc, PRECISION)

    out = partial + ((split.to(tl.int64) * taps + tap) * groups + group) * c_in * c_out
    tl.store(out + ci.to(tl.int64)[:, None] * c_out + co[None, :], acc, mask=ci_ok[:, None] & co_ok[None, :])
