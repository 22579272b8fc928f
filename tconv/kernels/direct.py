"""Direct kernels on the CUDA cores: depthwise layers and groups of a few channels.

A tensor-core tile would be mostly padding there.  Multiply-adds in fp32 (fp64 in the interpreter),
exact whatever the TF32 flags say.
"""

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
    split_row,
    split_tap,
    store_tile,
)


@triton.jit(
    repr=kernel_name("tconv_gather_direct"),
    do_not_specialize=[*GATHER_SCALARS, "groups", "w_g", "w_s", "w_t", "w_d", "w_h", "w_w"],
)
def gather_direct(
    src, weight, bias, dst,
    batch, c_src, c_dst,  # channels are those of one group
    d_src, h_src, w_src, d_dst, h_dst, w_dst,
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    gcdd, gcdh, gcdw, invd, invh, invw,
    src_n, src_c, src_d, src_h, src_w, dst_n, dst_c, dst_d, dst_h, dst_w,
    groups, w_g, w_s, w_t, w_d, w_h, w_w,
    FORWARD: tl.constexpr, SRC_LAYOUT: tl.constexpr, DST_LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    LARGE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """gather_gemm's sum without the GEMM: a tile of BLOCK_M pixels of one phase by BLOCK_N channels.

    w_g, w_s, w_t: the weight's strides along group, source channel and destination channel.
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
    channels = groups * c_dst
    tiles_w = tl.cdiv(q_w, BOX_W)
    rows = batch * q_d * q_h
    if LARGE:
        rows = batch.to(tl.int64) * q_d * q_h
    tiles_r = tl.cdiv(rows, ROWS).to(tl.int32)

    pid = tl.program_id(0)
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
    tile_n = pid // tiles_r

    first_d, tap_step_d, count_d, off_d, step_d = axis_taps(phase_d, kd, strided, padd, dild, gcdd, invd, FORWARD)
    first_h, tap_step_h, count_h, off_h, step_h = axis_taps(phase_h, kh, strideh, padh, dilh, gcdh, invh, FORWARD)
    first_w, tap_step_w, count_w, off_w, step_w = axis_taps(phase_w, kw, stridew, padw, dilw, gcdw, invw, FORWARD)

    m = tl.arange(0, BLOCK_M)
    row = tile_r * ROWS + m // BOX_W
    qw = tile_w * BOX_W + m % BOX_W
    co = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if LARGE:
        row = tile_r.to(tl.int64) * ROWS + m // BOX_W
        qw = qw.to(tl.int64)
        co = co.to(tl.int64)
    n, qd, qh = split_row(row, q_d, q_h)
    row_ok = row < rows
    co_ok = co < channels
    group = co // c_dst
    id0 = (qd * mult_d + off_d).to(tl.int32)
    ih0 = (qh * mult_h + off_h).to(tl.int32)
    iw0 = (qw * mult_w + off_w).to(tl.int32)
    if LARGE:
        pixel = n * src_n + id0.to(tl.int64) * src_d + ih0.to(tl.int64) * src_h + iw0.to(tl.int64) * src_w
    else:
        pixel = n * src_n + id0 * src_d + ih0 * src_h + iw0 * src_w
    src_channel = group * c_src * src_c
    w_channel = group.to(tl.int64) * w_g + (co % c_dst).to(tl.int64) * w_t

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for i in range(count_d * count_h * count_w * c_src):
        j = i % c_src
        jd, jh, jw = split_tap(i // c_src, count_h, count_w)
        tap = (
            (first_d + jd * tap_step_d).to(tl.int64) * w_d
            + (first_h + jh * tap_step_h).to(tl.int64) * w_h
            + (first_w + jw * tap_step_w).to(tl.int64) * w_w
        )
        dd = jd * step_d
        dh = jh * step_h
        dw = jw * step_w
        ok = row_ok & inside(id0 + dd, d_src) & inside(ih0 + dh, h_src) & inside(iw0 + dw, w_src)
        if LARGE:
            delta = dd.to(tl.int64) * src_d + dh.to(tl.int64) * src_h + dw.to(tl.int64) * src_w
            source = src_channel + j.to(tl.int64) * src_c
        else:
            delta = dd * src_d + dh * src_h + dw * src_w
            source = src_channel + j * src_c
        v = load_tile(src, pixel + delta, source, ok[:, None] & co_ok[None, :], SRC_LAYOUT)
        w = tl.load(weight + (w_channel + j.to(tl.int64) * w_s + tap), mask=co_ok, other=0.0)
        # A pixel outside the source adds nothing, also where the weight is infinite or NaN.  Selected after the sum,
        # so that product and sum fuse.
        acc = tl.where(ok[:, None], acc + v.to(ACC) * w.to(ACC)[None, :], acc)

    if HAS_BIAS:
        acc += tl.load(bias + co, mask=co_ok, other=0.0).to(ACC)[None, :]
    od = qd * phases_d + phase_d
    oh = qh * phases_h + phase_h
    ow = qw * phases_w + phase_w
    ok = row_ok & (od < d_dst) & (oh < h_dst) & (ow < w_dst)
    out = n * dst_n + od * dst_d + oh * dst_h + ow * dst_w
    store_tile(dst, out, co * dst_c, acc, ok[:, None] & co_ok[None, :], DST_LAYOUT)


@triton.jit(
    repr=kernel_name("tconv_weight_direct"),
    do_not_specialize=WEIGHT_SCALARS,
)
def weight_direct(
    x, y, partial,
    batch, c_in, c_out, groups,  # channels are those of one group
    d_in, h_in, w_in, d_out, h_out, w_out,
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w,
    per_split,
    X_LAYOUT: tl.constexpr, Y_LAYOUT: tl.constexpr,
    LARGE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """weight_gemm's partial sums without the GEMM.

    A tile of BLOCK_M input pixels by BLOCK_N weight columns, a column being an (input channel,
    output channel of its group) pair; multiplied elementwise, summed over the pixels at the end.
    """
    ROWS: tl.constexpr = BLOCK_M // BOX_W
    x_n, x_c, x_d, x_h, x_w = known_strides(x_n, x_c, x_d, x_h, x_w, X_LAYOUT)
    y_n, y_c, y_d, y_h, y_w = known_strides(y_n, y_c, y_d, y_h, y_w, Y_LAYOUT)
    c_in = known_channels(c_in, X_LAYOUT)
    c_out = known_channels(c_out, Y_LAYOUT)
    columns = groups * c_in * c_out
    tiles_n = tl.cdiv(columns, BLOCK_N)
    taps = kd * kh * kw
    pid = tl.program_id(0)
    tap = pid % taps
    pid = pid // taps
    tile_n = pid % tiles_n
    split = pid // tiles_n

    off_d = tap // (kh * kw) * dild - padd
    off_h = tap // kw % kh * dilh - padh
    off_w = tap % kw * dilw - padw
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < columns
    ci = column // c_out
    co = ci // c_in * c_out + column % c_out
    rows = batch * d_in * h_in
    if LARGE:
        rows = batch.to(tl.int64) * d_in * h_in
        ci = ci.to(tl.int64)
        co = co.to(tl.int64)
    tiles_w = tl.cdiv(w_in, BOX_W)
    tiles = tl.cdiv(rows, ROWS).to(tl.int32) * tiles_w
    m = tl.arange(0, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        tile_r = tile // tiles_w
        row = tile_r * ROWS + m // BOX_W
        iw = tile % tiles_w * BOX_W + m % BOX_W
        if LARGE:
            row = tile_r.to(tl.int64) * ROWS + m // BOX_W
            iw = iw.to(tl.int64)
        n, id_, ih = split_row(row, d_in, h_in)
        od = id_ * strided + off_d
        oh = ih * strideh + off_h
        ow = iw * stridew + off_w
        ok = (row < rows) & (iw < w_in)
        ok = ok & (od >= 0) & (od < d_out) & (oh >= 0) & (oh < h_out) & (ow >= 0) & (ow < w_out)
        mask = ok[:, None] & column_ok[None, :]
        a = load_tile(x, n * x_n + id_ * x_d + ih * x_h + iw * x_w, ci * x_c, mask, X_LAYOUT)
        b = load_tile(y, n * y_n + od * y_d + oh * y_h + ow * y_w, co * y_c, mask, Y_LAYOUT)
        acc += a.to(ACC) * b.to(ACC)

    # In float64, since a tile of 512 pixels is a long enough sum for fp32 to lose against torch's cascades.
    total = tl.sum(acc.to(tl.float64), 0).to(partial.dtype.element_ty)
    tl.store(partial + (split.to(tl.int64) * taps + tap) * columns + column, total, mask=column_ok)
