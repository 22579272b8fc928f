"""The forward pass on the CUDA cores, for few channels: depthwise layers, a model's last layer.

A tensor-core tile would be mostly padding.  A program does every phase along height and width of its pixels, so that each
input pixel is read once for all the products that it has a part in, and whole runs of outputs are written.  Multiply-adds
in fp32 (fp64 in the interpreter), exact whatever the TF32 flags say.
"""

import triton
import triton.language as tl

from .common import axis_taps, inside, split_row, widen

SCALARS = (
    "batch c_src c_dst groups d_src h_src w_src d_dst h_dst w_dst kd strided padd dild gcdd invd "
    "src_n src_c src_d src_h dst_n dst_c dst_d dst_h dst_w w_g w_s w_d"
).split()


def _name(specialization):
    t = specialization.constants["t"]
    dtype = specialization.signature["src"].lstrip("*")
    return f"tconv_few_forward_{dtype}_{t.stride_h}x{t.stride_w}x{t.channels}_{len(t.reads)}_{t.pixels}"


@triton.jit
def _add(sums, i: tl.constexpr, product):
    return sums[:i] + (sums[i] + product,) + sums[i + 1 :]


@triton.jit
def _zeros(PIXELS: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr):
    if COUNT == 0:
        return ()
    else:
        return (tl.zeros((PIXELS,), ACC),) + _zeros(PIXELS, ACC, COUNT - 1)


@triton.jit
def _add_channels(
    sums, src, weight, c, plane_ok, qh, qw, h_src, w_src, src_c, src_h, w_s, ACC: tl.constexpr, t: tl.constexpr
):  # fmt: skip
    """Add the products of t.unroll input channels from c on; src and weight are those of one tap along the depth."""
    for u in tl.static_range(tl.constexpr(t.unroll)):
        of_channel = weight + (c + u) * w_s.to(tl.int64)
        at = src + (c + u) * src_c
        for r in tl.static_range(len(t.reads)):
            ok = plane_ok & inside(qh + t.reads[r][0], h_src) & inside(qw + t.reads[r][1], w_src)
            # The height's part first: the width's is then a constant of the load.
            v = widen(tl.load(at + t.reads[r][0] * src_h + t.reads[r][1], mask=ok, other=0.0), ACC)
            sums = _add_products(sums, v, of_channel, r, t)
    return sums


@triton.jit
def _add_products(sums, v, weight, READ: tl.constexpr, t: tl.constexpr):
    """Add what one input pixel contributes to each sum."""
    for u in tl.static_range(len(t.reads[READ][2])):
        for co in tl.static_range(tl.constexpr(t.channels)):
            w = tl.load(
                weight
                + (co * t.weight[0] + t.reads[READ][2][u][1] * t.weight[1] + t.reads[READ][2][u][2] * t.weight[2])
            )
            sums = _add(sums, t.reads[READ][2][u][0] * t.channels + co, v * widen(w, v.dtype))
    return sums


@triton.jit
def _joined(sums, FIRST: tl.constexpr, t: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """[pixels, WIDTH]: the sums of so many phases along the width, side by side."""
    if WIDTH == 1:
        return sums[FIRST][:, None]
    else:
        even = _joined(sums, FIRST, t, WIDTH // 2, 2 * STEP)
        odd = _joined(sums, FIRST + STEP * t.channels, t, WIDTH // 2, 2 * STEP)
        return tl.join(even, odd).reshape([t.pixels, WIDTH])


@triton.jit(repr=_name, do_not_specialize=SCALARS)
def gather_few(
    src, weight, bias, dst,
    batch, c_src, c_dst, groups, d_src, h_src, w_src, d_dst, h_dst, w_dst, kd, strided, padd, dild, gcdd, invd,
    src_n, src_c, src_d, src_h, dst_n, dst_c, dst_d, dst_h, dst_w, w_g, w_s, w_d,
    DST_WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """dst[n, co, q*stride + a] = bias[co] + sum over taps of phase a and over ci of src * weight.

    c_src and c_dst are a group's.  `t` is a tconv.few.Few; w_g, w_s, w_d: the weight's strides along group, source channel
    and depth.  The source's width is contiguous, the destination's if DST_WIDTH.
    """
    if DST_WIDTH:
        dst_w = 1
    PIXELS: tl.constexpr = t.pixels
    ROWS: tl.constexpr = t.pixels // t.box
    q_d = tl.cdiv(d_dst, strided)
    q_h = tl.cdiv(h_dst, t.stride_h)
    q_w = tl.cdiv(w_dst, t.stride_w)
    tiles_w = tl.cdiv(q_w, t.box)
    rows = batch * q_d * q_h
    tiles_r = tl.cdiv(rows, ROWS)
    blocks = c_dst // t.channels

    # What reads the same input pixels is neighbours.
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    used_d = tl.minimum(strided, d_dst)
    phase_d = pid % used_d
    pid = pid // used_d
    tile_w = pid % tiles_w
    pid = pid // tiles_w
    tile_r = pid % tiles_r
    group = pid // tiles_r

    first_d, tap_step_d, count_d, off_d, step_d = axis_taps(phase_d, kd, strided, padd, dild, gcdd, invd, True)
    m = tl.arange(0, PIXELS)
    row = tile_r * ROWS + m // t.box
    qw = tile_w * t.box + m % t.box
    n, qd, qh = split_row(row, q_d, q_h)
    row_ok = row < rows
    id0 = qd + off_d
    pixel = n * src_n + id0 * src_d + qh * src_h + qw + group * c_src * src_c
    co0 = block * t.channels
    weights = weight + group.to(tl.int64) * w_g + co0.to(tl.int64) * t.weight[0]

    sums = _zeros(PIXELS, ACC, t.sums)
    for jd in range(count_d):
        plane_ok = row_ok & inside(id0 + jd * step_d, d_src)
        plane = pixel + jd * step_d * src_d
        of_tap = weights + (first_d + jd * tap_step_d).to(tl.int64) * w_d
        if t.block:
            for first in range(0, c_src, t.block):
                in_block = _zeros(PIXELS, ACC, t.sums)
                for c in range(first, tl.minimum(first + t.block, c_src), t.unroll):
                    in_block = _add_channels(
                        in_block, src + plane, of_tap, c, plane_ok, qh, qw, h_src, w_src, src_c, src_h, w_s, ACC, t
                    )
                for i in tl.static_range(tl.constexpr(t.sums)):
                    sums = _add(sums, i, in_block[i])
        else:
            for c in range(0, c_src, t.unroll):
                sums = _add_channels(
                    sums, src + plane, of_tap, c, plane_ok, qh, qw, h_src, w_src, src_c, src_h, w_s, ACC, t
                )

    od = qd * strided + phase_d
    out = n * dst_n + od * dst_d + (group * c_dst + co0) * dst_c
    out_ok = row_ok & (od < d_dst)
    W: tl.constexpr = t.stride_w if t.stride_w & (t.stride_w - 1) == 0 else 1  # phases side by side
    for a in tl.static_range(tl.constexpr(t.stride_h)):
        oh = qh * t.stride_h + a
        for b in tl.static_range(tl.constexpr(t.stride_w // W)):
            ow = (qw * t.stride_w + b)[:, None] + tl.arange(0, W)[None, :]
            ok = (out_ok & (oh < h_dst))[:, None] & (ow < w_dst)
            at = (out + oh * dst_h)[:, None] + ow * dst_w
            for co in tl.static_range(tl.constexpr(t.channels)):
                v = _joined(sums, (a * t.stride_w + b) * t.channels + co, t, W, 1)
                if HAS_BIAS:
                    v += widen(tl.load(bias + (group * c_dst + co0 + co)), ACC)
                tl.store(dst + at + co * dst_c, v.to(dst.dtype.element_ty), mask=ok)
