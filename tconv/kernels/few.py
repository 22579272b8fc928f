"""Few channels on the CUDA cores: depthwise layers, a model's last layer, and the gradients of such layers.

A tensor-core tile would be mostly padding.  A program does every phase along height and width of its pixels, so that each
source pixel is read once for all the products that it has a part in, and whole runs are written.  Multiply-adds in fp32
(fp64 in the interpreter), exact whatever the TF32 flags say.  What differs between layers is a tconv.few.Few, `t`.  Tiles
are rows by columns of pixels; or pixels by channels, `t.lanes` of them, in channels_last.
"""

import triton
import triton.language as tl

from .common import axis_taps, inside, known_strides, split_row, widen

GATHER = (
    "batch c_src c_dst groups d_src h_src w_src d_dst h_dst w_dst kd strided padd dild gcdd invd "
    "src_n src_c src_d src_h src_w dst_n dst_c dst_d dst_h dst_w w_g w_s w_d w_tap"
).split()
WEIGHT = (
    "batch c_in c_out groups d_in h_in w_in d_out h_out w_out kd strided padd dild "
    "x_n x_c x_d x_h x_w y_n y_c y_d y_h y_w per_split"
).split()


def _name(base, tensor):
    def name(specialization):
        c = specialization.constants
        t, dtype = c["t"], specialization.signature[tensor].lstrip("*")
        what = base + {True: "_forward", False: "_backward_input"}.get(c.get("FORWARD"), "")
        last = f"_channels_last{t.lanes}" if t.lanes > 1 else ""
        return f"{what}{last}_{dtype}_{t.phases_h}x{t.phases_w}x{t.channels}_{len(t.reads)}_{t.pixels}"

    return name


@triton.jit
def _put(sums, i: tl.constexpr, v):
    return sums[:i] + (v,) + sums[i + 1 :]


@triton.jit
def _add(sums, i: tl.constexpr, product):
    return _put(sums, i, sums[i] + product)


@triton.jit
def _zeros(ACC: tl.constexpr, COUNT: tl.constexpr, t: tl.constexpr):
    if COUNT == 0:
        return ()
    elif t.lanes > 1:
        return (tl.zeros((tl.constexpr(t.pixels), tl.constexpr(t.lanes)), ACC),) + _zeros(ACC, COUNT - 1, t)
    else:
        return (tl.zeros((tl.constexpr(t.pixels // t.box), tl.constexpr(t.box)), ACC),) + _zeros(ACC, COUNT - 1, t)


@triton.jit
def _pixels(tile_r, tile_w, t: tl.constexpr):
    """(row, column) of a tile's pixels, [pixels, 1]; or [rows, 1] and [1, columns], so that a row is worked out once."""
    if t.lanes > 1:
        m = tl.arange(0, tl.constexpr(t.pixels))[:, None]
        return tile_r * (t.pixels // t.box) + m // t.box, tile_w * t.box + m % t.box
    else:
        r = tl.arange(0, tl.constexpr(t.pixels // t.box))[:, None]
        return tile_r * (t.pixels // t.box) + r, tile_w * t.box + tl.arange(0, tl.constexpr(t.box))[None, :]


@triton.jit
def _divisible(width, n, c, d, h, BY: tl.constexpr):
    """The same, which the compiler then knows to be multiples of BY: so many elements are one access."""
    return width // BY * BY, n // BY * BY, c // BY * BY, d // BY * BY, h // BY * BY


@triton.jit
def _lanes(first, t: tl.constexpr):
    """The channels of a tile, from the first on."""
    if t.lanes > 1:
        return first + tl.arange(0, tl.constexpr(t.lanes))[None, :]
    else:
        return first


@triton.jit
def _add_channels(
    sums, src, weight, c, plane_ok, ih, iw, h_src, w_src, src_c, src_h, src_w, w_s, w_tap, ACC: tl.constexpr,
    t: tl.constexpr,
):  # fmt: skip
    """Add the products of t.unroll source channels from c on; src and weight are those of one tap along the depth."""
    for u in tl.static_range(tl.constexpr(t.unroll)):
        of_channel = weight + (c + u) * w_s.to(tl.int64)
        at = src + (c + u) * src_c
        for r in tl.static_range(len(t.reads)):
            ok = plane_ok & inside(ih + t.reads[r][0], h_src) & inside(iw + t.reads[r][1], w_src)
            # The height's part first: the width's is then a constant of the load.
            v = widen(tl.load(at + t.reads[r][0] * src_h + t.reads[r][1] * src_w, mask=ok, other=0.0), ACC)
            sums = _add_products(sums, v, of_channel, w_tap, r, t)
    return sums


@triton.jit
def _add_products(sums, v, weight, w_tap, READ: tl.constexpr, t: tl.constexpr):
    """Add what one source pixel contributes to each sum."""
    for u in tl.static_range(len(t.reads[READ][2])):
        for co in tl.static_range(tl.constexpr(t.channels)):
            w = tl.load(
                weight
                + co * t.weight[0]
                + (t.reads[READ][2][u][1] * t.weight[1] + t.reads[READ][2][u][2] * t.weight[2]) * w_tap
            )
            sums = _add(sums, t.reads[READ][2][u][0] * t.channels + co, v * widen(w, v.dtype))
    return sums


@triton.jit
def _joined(sums, FIRST: tl.constexpr, t: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """[rows, columns * WIDTH]: the sums of so many phases along the width, side by side."""
    if WIDTH == 1:
        return sums[FIRST]
    else:
        even = _joined(sums, FIRST, t, WIDTH // 2, 2 * STEP)
        odd = _joined(sums, FIRST + STEP * t.channels, t, WIDTH // 2, 2 * STEP)
        return tl.join(even, odd).reshape([t.pixels // t.box, t.box * WIDTH])


@triton.jit(repr=_name("tconv_few", "src"), do_not_specialize=GATHER)
def gather_few(
    src, weight, bias, dst,
    batch, c_src, c_dst, groups, d_src, h_src, w_src, d_dst, h_dst, w_dst, kd, strided, padd, dild, gcdd, invd,
    src_n, src_c, src_d, src_h, src_w, dst_n, dst_c, dst_d, dst_h, dst_w, w_g, w_s, w_d, w_tap,
    FORWARD: tl.constexpr, SRC_WIDTH: tl.constexpr, DST_WIDTH: tl.constexpr, SRC_VECTOR: tl.constexpr, DST_VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """dst[n, co, q*phases + a] = bias[co] + sum over taps of phase a and over ci of src * weight.

    c_src and c_dst are a group's, where channels lie side by side all there are (and groups is 1).  w_g, w_s, w_d, w_tap:
    the weight's strides along group, source channel, depth, and for t.weight to multiply.  SRC_VECTOR and DST_VECTOR divide
    the strides and the width of a tensor along whose width neighbours lie.
    """
    SRC_LAYOUT: tl.constexpr = (
        "vectors" if t.own and t.lanes > 1 else "width" if SRC_WIDTH and t.lanes == 1 else "strided"
    )
    DST_LAYOUT: tl.constexpr = "vectors" if t.lanes > 1 else "width" if DST_WIDTH else "strided"
    # Not the channels': a channel of a thread's own is the first of one, and to say so made longer code.
    src_n, _, src_d, src_h, src_w = known_strides(src_n, src_c, src_d, src_h, src_w, SRC_LAYOUT)
    dst_n, dst_c, dst_d, dst_h, dst_w = known_strides(dst_n, dst_c, dst_d, dst_h, dst_w, DST_LAYOUT)
    if t.lanes > 1:
        w_s = w_s // 16 * 16
        w_d = w_d // 16 * 16
        w_tap = w_tap // 16 * 16
    else:
        w_tap = 1
        w_src, src_n, src_c, src_d, src_h = _divisible(w_src, src_n, src_c, src_d, src_h, SRC_VECTOR)
        w_dst, dst_n, dst_c, dst_d, dst_h = _divisible(w_dst, dst_n, dst_c, dst_d, dst_h, DST_VECTOR)
    phases_d = strided if FORWARD else 1
    q_d = tl.cdiv(d_dst, phases_d)
    q_h = tl.cdiv(h_dst, t.phases_h)
    q_w = tl.cdiv(w_dst, t.phases_w)
    tiles_w = tl.cdiv(q_w, t.box)
    rows = batch * q_d * q_h
    tiles_r = tl.cdiv(rows, t.pixels // t.box)
    blocks = c_dst // (t.channels * t.lanes)

    # What reads the same source pixels is neighbours.
    pid = tl.program_id(0)
    block = pid % blocks
    pid = pid // blocks
    used_d = tl.minimum(phases_d, d_dst)
    phase_d = pid % used_d
    pid = pid // used_d
    tile_w = pid % tiles_w
    pid = pid // tiles_w
    tile_r = pid % tiles_r
    group = pid // tiles_r

    first_d, tap_step_d, count_d, off_d, step_d = axis_taps(phase_d, kd, strided, padd, dild, gcdd, invd, FORWARD)
    row, qw = _pixels(tile_r, tile_w, t)
    n, qd, qh = split_row(row, q_d, q_h)
    row_ok = row < rows
    id0 = qd * (1 if FORWARD else strided) + off_d
    ih = qh * t.step_h
    iw = qw * t.step_w
    pixel = n * src_n + id0 * src_d + ih * src_h + iw * src_w + group * c_src * src_c
    co0 = block * (t.channels * t.lanes)
    co = _lanes(co0, t)
    if t.lanes == 1:
        weights = weight + group.to(tl.int64) * w_g + co0.to(tl.int64) * t.weight[0]
    else:
        weights = weight + co
        if t.own:
            pixel += co

    sums = _zeros(ACC, t.sums, t)
    for jd in range(count_d):
        plane_ok = row_ok & inside(id0 + jd * step_d, d_src)
        plane = src + (pixel + jd * step_d * src_d)
        of_tap = weights + w_d.to(tl.int64) * (first_d + jd * tap_step_d)
        if t.block:
            for first in range(0, c_src, t.block):
                in_block = _zeros(ACC, t.sums, t)
                for c in range(first, tl.minimum(first + t.block, c_src), t.unroll):
                    in_block = _add_channels(
                        in_block, plane, of_tap, c, plane_ok, ih, iw, h_src, w_src, src_c, src_h, src_w, w_s, w_tap,
                        ACC, t,
                    )  # fmt: skip
                for i in tl.static_range(tl.constexpr(t.sums)):
                    sums = _add(sums, i, in_block[i])
        else:
            for c in range(0, c_src, t.unroll):
                sums = _add_channels(
                    sums, plane, of_tap, c, plane_ok, ih, iw, h_src, w_src, src_c, src_h, src_w, w_s, w_tap, ACC, t
                )

    od = qd * phases_d + phase_d
    out = n * dst_n + od * dst_d + (group * c_dst + co) * dst_c
    out_ok = row_ok & (od < d_dst)
    W: tl.constexpr = t.phases_w if t.lanes == 1 and t.phases_w & (t.phases_w - 1) == 0 else 1  # side by side
    for a in tl.static_range(tl.constexpr(t.phases_h)):
        oh = qh * t.phases_h + a
        for b in tl.static_range(tl.constexpr(t.phases_w // W)):
            for c in tl.static_range(tl.constexpr(t.channels)):
                if t.lanes > 1:
                    ow = qw * t.phases_w + b
                    ok = out_ok & (oh < h_dst) & (ow < w_dst)
                    at = out + oh * dst_h + ow * dst_w
                    v = sums[(a * t.phases_w + b) * t.channels + c]
                else:
                    if W == 1:
                        ow = qw * t.phases_w + b
                    else:
                        ow = tile_w * (t.box * W) + tl.arange(0, tl.constexpr(t.box * W))[None, :]
                    ok = out_ok & (oh < h_dst) & (ow < w_dst)
                    at = out + oh * dst_h + ow * dst_w + c * dst_c
                    v = _joined(sums, (a * t.phases_w + b) * t.channels + c, t, W, 1)
                if HAS_BIAS:
                    v += widen(tl.load(bias + (group * c_dst + co + c)), ACC)
                tl.store(dst + at, v.to(dst.dtype.element_ty), mask=ok)


@triton.jit(repr=_name("tconv_few_backward_weight", "x"), do_not_specialize=WEIGHT)
def weight_few(
    x, y, partial,
    batch, c_in, c_out, groups, d_in, h_in, w_in, d_out, h_out, w_out, kd, strided, padd, dild,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, per_split,
    ACC: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """partial[split, tap, column] = sum over this split's tiles of input pixels of x * y, for all taps of one plane.

    y is the output's gradient; a column is an (input channel, output channel of its group) pair; c_in and c_out are a
    group's.  Where channels lie side by side, both are 1.
    """
    LAYOUT: tl.constexpr = "vectors" if t.lanes > 1 else "width"
    x_n, x_c, x_d, x_h, x_w = known_strides(x_n, x_c, x_d, x_h, x_w, LAYOUT)
    y_n, y_c, y_d, y_h, y_w = known_strides(y_n, y_c, y_d, y_h, y_w, LAYOUT)
    columns = groups * c_in * c_out
    blocks = columns // t.lanes
    # What reads the same pixels is neighbours.
    pid = tl.program_id(0)
    tap_d = pid % kd
    pid = pid // kd
    block = pid % blocks
    split = pid // blocks
    column = _lanes(block * t.lanes, t)
    if t.lanes > 1:
        ci = column
        co = column
    else:
        ci = column // c_out
        co = ci // c_in * c_out + column % c_out
    rows = batch * d_in * h_in
    tiles_w = tl.cdiv(w_in, t.box)
    tiles = tl.cdiv(rows, t.pixels // t.box) * tiles_w

    sums = _zeros(ACC, len(t.reads), t)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        row, iw = _pixels(tile // tiles_w, tile % tiles_w, t)
        n, id_, ih = split_row(row, d_in, h_in)
        od = id_ * strided + (tap_d * dild - padd)
        oh = ih * t.step_h
        ow = iw * t.step_w
        ok = (row < rows) & (iw < w_in) & inside(od, d_out)
        of_x = tl.load(x + (n * x_n + id_ * x_d + ih * x_h + iw * x_w + ci * x_c), mask=ok, other=0.0)
        plane = y + (n * y_n + od * y_d + oh * y_h + ow * y_w + co * y_c)
        for r in tl.static_range(len(t.reads)):
            ok_y = ok & inside(oh + t.reads[r][0], h_out) & inside(ow + t.reads[r][1], w_out)
            of_y = tl.load(plane + t.reads[r][0] * y_h + t.reads[r][1] * y_w, mask=ok_y, other=0.0)
            # An infinity beside the border multiplies nothing.  Selected after the sum, so that product and sum fuse.
            added = sums[r] + widen(of_x, ACC) * widen(of_y, ACC)
            sums = _put(sums, r, tl.where(ok_y, added, sums[r]))
    for r in tl.static_range(len(t.reads)):
        tap = tap_d * len(t.reads) + r
        at = partial + (split.to(tl.int64) * kd * len(t.reads) + tap) * columns
        if t.lanes > 1:
            total = tl.sum(sums[r].to(tl.float64), 0).to(partial.dtype.element_ty)
            tl.store(at + block * t.lanes + tl.arange(0, tl.constexpr(t.lanes)), total)
        else:
            tl.store(at + column, tl.sum(sums[r].to(tl.float64)).to(partial.dtype.element_ty))
