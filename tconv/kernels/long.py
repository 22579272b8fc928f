"""Few channels with long kernels and strides, on the CUDA cores: neighbouring threads take what lies side by side in the
output (or its gradient), which are phases or taps, where other kernels' threads take pixels, a stride apart.

Multiply-adds in fp32 (fp64 in the interpreter), exact whatever the TF32 flags say.
"""

import triton
import triton.language as tl

from .common import inside, kernel_name, split_row, widen


@triton.jit(
    repr=kernel_name("tconv_gather_phases"),
    do_not_specialize=(
        "batch channels c_src c_dst d_src h_src w_src d_dst h_dst w_dst "
        "kd kh kw strided strideh stridew padd padh padw "
        "src_n src_c src_d src_h src_w dst_n dst_c dst_d dst_h dst_w w_g w_s w_t w_d w_h w_w"
    ).split(),
)
def gather_phases(
    src, weight, bias, dst,
    batch, channels, c_src, c_dst, d_src, h_src, w_src, d_dst, h_dst, w_dst,  # c_src and c_dst are a group's
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw,
    src_n, src_c, src_d, src_h, src_w, dst_n, dst_c, dst_d, dst_h, dst_w, w_g, w_s, w_t, w_d, w_h, w_w,
    HAS_BIAS: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dst[n, co, q*stride + r - padding] = bias[co] + sum over ci and j of src[n, ci, q - j] * weight[ci, co, j*stride + r].

    Without dilation.  Phases r count from the padding's beginning, so that all of them read the same source pixels.
    A program has BLOCK_M q of one row by BLOCK_N phases, of one channel.  LAST: in channels_last.  EVEN: whether all phases
    have the same number of taps, and BLOCK_N divides how many phases there are.  UNROLL source channels, which divide c_src,
    are loaded together.
    """
    q_d = tl.cdiv(d_dst + padd, strided)
    q_h = tl.cdiv(h_dst + padh, strideh)
    q_w = tl.cdiv(w_dst + padw, stridew)
    phases = strided * strideh * stridew
    tiles_n = tl.cdiv(phases, BLOCK_N)
    tiles_m = tl.cdiv(q_w, BLOCK_M)
    rows = batch * q_d * q_h
    pid = tl.program_id(0)
    if LAST:  # what writes the same sectors is neighbours
        channel = pid % channels
        pid = pid // channels
    tile_n = pid % tiles_n
    pid = pid // tiles_n
    tile_m = pid % tiles_m
    pid = pid // tiles_m
    n, qd, qh = split_row(pid % rows, q_d, q_h)
    if not LAST:
        channel = pid // rows
    group = channel // c_dst

    qw = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rw = r % stridew
    rh = r // stridew % strideh
    rd = r // (stridew * strideh)
    src += n * src_n + qd * src_d + qh * src_h + group * c_src * src_c
    w_s, w_d, w_h, w_w = w_s.to(tl.int64), w_d.to(tl.int64), w_h.to(tl.int64), w_w.to(tl.int64)
    weight += group.to(tl.int64) * w_g + (channel % c_dst).to(tl.int64) * w_t
    of_phase = rd * w_d + rh * w_h + rw * w_w
    of_pixel = qw * src_w

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for jd in range(tl.maximum(qd - d_src + 1, 0), tl.minimum(tl.cdiv(kd, strided), qd + 1)):
        for jh in range(tl.maximum(qh - h_src + 1, 0), tl.minimum(tl.cdiv(kh, strideh), qh + 1)):
            taps = (rd + jd * strided < kd) & (rh + jh * strideh < kh)
            of_row = jd * strided * w_d + jh * strideh * w_h
            for jw in range(tl.cdiv(kw, stridew)):
                read = inside(qw - jw, w_src)
                tap = taps & (rw + jw * stridew < kw)
                if EVEN:
                    reached = read[:, None]
                else:
                    reached = read[:, None] & tap[None, :]
                of_tap = of_row + jw * stridew * w_w
                for first in range(0, c_src, UNROLL):
                    for u in tl.static_range(UNROLL):
                        c = first + u
                        at = src + (c * src_c - jd * src_d - jh * src_h - jw * src_w)
                        v = tl.load(at + of_pixel, mask=read, other=0.0)
                        of = weight + (c * w_s + of_tap)
                        if EVEN:
                            w = tl.load(of + of_phase)
                        else:
                            w = tl.load(of + of_phase, mask=tap, other=0.0)
                        # An infinity beside the border, or where a phase has no tap, multiplies nothing.
                        acc = tl.where(reached, acc + widen(v, ACC)[:, None] * widen(w, ACC)[None, :], acc)

    if HAS_BIAS:
        acc += widen(tl.load(bias + channel), ACC)
    od = qd * strided - padd + rd
    oh = qh * strideh - padh + rh
    ow = qw * stridew - padw
    ok = (r < phases) & inside(od, d_dst) & inside(oh, h_dst)
    out = (ow * dst_w)[:, None] + (od * dst_d + oh * dst_h + rw * dst_w)[None, :]
    dst += n * dst_n + channel * dst_c
    tl.store(dst + out, acc.to(dst.dtype.element_ty), mask=ok[None, :] & inside(ow[:, None] + rw[None, :], w_dst))


@triton.jit(
    repr=kernel_name("tconv_input_columns"),
    do_not_specialize=(
        "c_src c_dst d_src h_src w_src d_dst h_dst w_dst rows "
        "kd kh kw strided strideh stridew padd padh padw dild dilh dilw "
        "src_n src_c src_d src_h src_w dst_n dst_c dst_d dst_h dst_w w_g w_s w_t w_d w_h w_w splits count"
    ).split(),
)
def input_columns(
    src, weight, dst,
    c_src, c_dst, d_src, h_src, w_src, d_dst, h_dst, w_dst, rows,  # channels are those of one group
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    src_n, src_c, src_d, src_h, src_w, dst_n, dst_c, dst_d, dst_h, dst_w, w_g, w_s, w_t, w_d, w_h, w_w,
    splits, count,
    ACC: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dst[split, n, ci, i] = sum over the split's part of (co, tap) of src[n, co, i*stride - padding + tap] * weight[ci, co, tap]:
    backward_input, a dot product of a patch of the output's gradient for each pixel and channel.

    A tile is CHANNELS ci by BLOCK_M pixels of one of all samples' rows by BLOCK_H x BLOCK_W taps; results of splits lie count
    apart.
    """
    tiles_m = tl.cdiv(w_dst, BLOCK_M)
    tiles_c = tl.cdiv(c_dst, CHANNELS)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    pid = pid // tiles_m
    n, d, h = split_row(pid % rows, d_dst, h_dst)
    pid = pid // rows
    split = pid % splits
    pid = pid // splits
    ci = pid % tiles_c * CHANNELS + tl.arange(0, CHANNELS)
    group = pid // tiles_c

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    sd = d * strided - padd
    sh = h * strideh - padh
    sw = m * stridew - padw
    lane = tl.arange(0, BLOCK_H * BLOCK_W)
    th = lane // BLOCK_W
    tw = lane % BLOCK_W
    src += n * src_n + sd * src_d + sh * src_h + group * c_src * src_c
    of_pixel = (sw * src_w)[:, None] + (th * dilh * src_h + tw * dilw * src_w)[None, :]
    column = sw[:, None] + (tw * dilw)[None, :]
    w_s, w_d, w_h, w_w = w_s.to(tl.int64), w_d.to(tl.int64), w_h.to(tl.int64), w_w.to(tl.int64)
    of_lane = th * w_h + tw * w_w
    of_lane = (group.to(tl.int64) * w_g + ci.to(tl.int64) * w_t)[:, None] + of_lane[None, :]
    ci_ok = ci < c_dst

    acc = tl.zeros((CHANNELS, BLOCK_M, BLOCK_H * BLOCK_W), ACC)
    blocks = tl.cdiv(kh, BLOCK_H)
    lines = c_src * kd * blocks
    for line in range(split * lines // splits, (split + 1) * lines // splits):
        jh = line % blocks * BLOCK_H
        jd = line // blocks % kd
        co = line // blocks // kd
        height = tl.where(inside(sd + jd * dild, d_src), h_src, 0)  # of a plane outside nothing is inside
        row_ok = (jh + th < kh) & inside(sh + (jh + th) * dilh, height)
        for jw in range(0, kw, BLOCK_W):
            tap_ok = (jh + th < kh) & (jw + tw < kw)
            read = (row_ok & (jw + tw < kw))[None, :] & inside(column + jw * dilw, w_src)
            at = src + (co * src_c + jd * dild * src_d + jh * dilh * src_h + jw * dilw * src_w)
            v = widen(tl.load(at + of_pixel, mask=read, other=0.0), ACC)
            of = co * w_s + jd * w_d + jh * w_h + jw * w_w
            u = widen(tl.load(weight + of + of_lane, mask=ci_ok[:, None] & tap_ok[None, :], other=0.0), ACC)
            # An infinity of the weight beside the border multiplies nothing.
            acc = tl.where(read[None, :, :], acc + u[:, None, :] * v[None, :, :], acc)

    dst += split.to(tl.int64) * count + n * dst_n + d * dst_d + h * dst_h
    out = ((group * c_dst + ci) * dst_c)[:, None] + (m * dst_w)[None, :]
    tl.store(dst + out, tl.sum(acc, 2).to(dst.dtype.element_ty), mask=ci_ok[:, None] & (m < w_dst)[None, :])
