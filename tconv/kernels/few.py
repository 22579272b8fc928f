"""Few channels on the CUDA cores: depthwise layers, a model's last layer, and the gradients of such layers.

A tensor-core tile would be mostly padding.  A program does every phase along height and width of its pixels, so that each
source pixel is read once for all the products that it has a part in, and whole runs are written.  Multiply-adds in fp32
(fp64 in the interpreter), exact whatever the TF32 flags say.  What differs between layers is a tconv.few.Few, `t`.  Tiles
are rows by columns of pixels; or pixels by channels, `t.lanes` of them, in channels_last.
"""

import triton
import triton.language as tl

from .common import axis_taps, divisible, inside, known_strides, split_row, widen

GATHER = (
    "batch c_src c_dst groups d_src h_src w_src d_dst h_dst w_dst kd strided padd dild gcdd invd "
    "src_n src_c src_d src_h src_w dst_n dst_c dst_d dst_h dst_w w_g w_s w_d parts per_part splits per_split count"
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
        phases = f"{t.phases_d}x{t.phases_h}x{t.phases_w}x{t.channels}"
        return f"{what}{last}_{dtype}_{phases}_{len(t.reads)}_{t.pixels}"

    return name


@triton.jit
def _put(sums, i: tl.constexpr, v):
    return sums[:i] + (v,) + sums[i + 1 :]


@triton.jit
def _add(sums, i: tl.constexpr, product):
    return _put(sums, i, sums[i] + product)


@triton.jit
def _zeros(ACC: tl.constexpr, COUNT: tl.constexpr, t: tl.constexpr):
    """So many sums.  By halves, as all that makes tuples here: one by one Triton 3.9 would exceed Python's depth of recursion."""
    if COUNT > 1:
        return _zeros(ACC, COUNT // 2, t) + _zeros(ACC, COUNT - COUNT // 2, t)
    elif t.lanes > 1:
        return (tl.zeros((tl.constexpr(t.pixels), tl.constexpr(t.lanes)), ACC),)
    else:
        return (tl.zeros((tl.constexpr(t.pixels // t.box), tl.constexpr(t.box)), ACC),)


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
def _split_row(row, d_size, h_size, t: tl.constexpr):
    """common.split_row, without the depth where there is none."""
    if t.depth == "none":
        return row // h_size, 0, row % h_size
    else:
        return split_row(row, d_size, h_size)


@triton.jit
def _columns(tile_w, qw, t: tl.constexpr):
    """The source columns of a read at offset 0: the step apart, or all there are, which _parts sorts."""
    if t.split == 1:
        return qw * t.step_w
    else:
        return tile_w * (t.box * t.split) + tl.arange(0, tl.constexpr(t.box * t.split))[None, :]


@triton.jit
def _parts(v, t: tl.constexpr):
    """Of a read, what belongs to each place within a step: columns a step apart."""
    if t.split == 1:
        return (v,)
    else:
        even, odd = tl.split(v.reshape([t.pixels // t.box, t.box * t.split // 2, 2]))
        if t.split == 2:
            return even, odd
        else:
            first, third = tl.split(even.reshape([t.pixels // t.box, t.box, 2]))
            second, fourth = tl.split(odd.reshape([t.pixels // t.box, t.box, 2]))
            return first, second, third, fourth


@triton.jit
def _lanes(first, t: tl.constexpr):
    """The channels of a tile, from the first on."""
    if t.lanes > 1:
        return first + tl.arange(0, tl.constexpr(t.lanes))[None, :]
    else:
        return first


@triton.jit
def _held(weight, ACC: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, t: tl.constexpr):
    """So many weights from the FIRST on, counted by tap and destination channel."""
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        return _held(weight, ACC, FIRST, HALF, t) + _held(weight, ACC, FIRST + HALF, COUNT - HALF, t)
    else:
        return (widen(_weight(weight, FIRST // t.channels, FIRST % t.channels, t), ACC),)


@triton.jit
def _biases(bias, split, ACC: tl.constexpr, COUNT: tl.constexpr, t: tl.constexpr):
    """The biases of so many destination channels; of parts the first has them."""
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        return _biases(bias, split, ACC, HALF, t) + _biases(bias + HALF, split, ACC, COUNT - HALF, t)
    elif t.parted:
        return (widen(tl.load(bias, mask=split == 0, other=0.0), ACC),)
    else:
        return (widen(tl.load(bias), ACC),)


@triton.jit
def _weight(weight, TAP: tl.constexpr, CO: tl.constexpr, t: tl.constexpr):
    KH: tl.constexpr = t.kernel[1]
    KW: tl.constexpr = t.kernel[2]
    of_tap = TAP // (KH * KW) * t.weight[1] + TAP // KW % KH * t.weight[2] + TAP % KW * t.weight[3]
    return tl.load(weight + (CO * t.weight[0] + of_tap))


@triton.jit
def _add_channels(sums, src, weight, held, c, ok, at, size, steps, w_s, ACC: tl.constexpr, t: tl.constexpr):
    """Add the products of t.unroll source channels from c on.

    at: where the pixels are, and size: how many there are, along depth, height and width; steps: the source's strides along
    channels, depth, height and width.  Where the depth's taps are looped over, src and weight are those of one of them, and
    ok says whether it is inside.
    """
    for u in tl.static_range(tl.constexpr(t.unroll)):
        of_channel = src
        weights = weight
        if not t.alone:
            weights += (c + u) * w_s.to(tl.int64)
            of_channel += (c + u) * steps[0]
        for r in tl.static_range(len(t.reads)):
            ok_r = ok
            from_r = of_channel
            if t.depth == "unrolled":
                ok_r = ok_r & inside(at[0] + t.reads[r][0], size[0])
                from_r += t.reads[r][0] * steps[1]
            ok_r = ok_r & inside(at[1] + t.reads[r][1], size[1]) & inside(at[2] + t.reads[r][2], size[2])
            # The width's part last: it is then a constant of the load.
            from_r += t.reads[r][1] * steps[2]
            parts = _parts(widen(tl.load(from_r + t.reads[r][2] * steps[3], mask=ok_r, other=0.0), ACC), t)
            sums = _add_products(sums, parts, weights, held, ACC, r, t)
    return sums


@triton.jit
def _add_all(sums, src, weight, held, ok, at, size, steps, c_src, w_s, ACC: tl.constexpr, t: tl.constexpr):
    """_add_channels of all source channels, in blocks where t.block says so."""
    if t.alone:
        sums = _add_channels(sums, src, weight, held, 0, ok, at, size, steps, w_s, ACC, t)
    elif t.block:
        for first in range(0, c_src, t.block):
            in_block = _zeros(ACC, t.sums, t)
            for c in range(first, tl.minimum(first + t.block, c_src), t.unroll):
                in_block = _add_channels(in_block, src, weight, held, c, ok, at, size, steps, w_s, ACC, t)
            for i in tl.static_range(tl.constexpr(t.sums)):
                sums = _add(sums, i, in_block[i])
    else:
        for c in range(0, c_src, t.unroll):
            sums = _add_channels(sums, src, weight, held, c, ok, at, size, steps, w_s, ACC, t)
    return sums


@triton.jit
def _add_products(sums, parts, weight, held, ACC: tl.constexpr, READ: tl.constexpr, t: tl.constexpr):
    """Add what one read contributes to each sum."""
    for u in tl.static_range(len(t.reads[READ][3])):
        for co in tl.static_range(tl.constexpr(t.channels)):
            if t.held:
                w = held[t.reads[READ][3][u][1] * t.channels + co]
            else:
                w = widen(_weight(weight, t.reads[READ][3][u][1], co, t), ACC)
            sums = _add(sums, t.reads[READ][3][u][0] * t.channels + co, parts[t.reads[READ][3][u][2]] * w)
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


@triton.jit
def _gather_tile(
    src, weights, held, bias, dst, tile_r, tile_w, quotient, size, src_n, steps, source, c_src, dst_size, dst_steps,
    to, w_s, of_depth, split, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """All that a tile's pixels are for.

    quotient: how many rows there are, and how many of them along depth and height, of one phase.  source and to: offsets of
    the channels; of_depth: what a loop over the depth's taps needs; split: which part these sums are.
    """
    rows, q_d, q_h = quotient
    row, qw = _pixels(tile_r, tile_w, t)
    n, qd, qh = _split_row(row, q_d, q_h, t)
    row_ok = row < rows
    ih = qh * t.step_h
    iw = _columns(tile_w, qw, t)
    pixel = n * src_n + ih * steps[2] + iw * steps[3] + source
    sums = _zeros(ACC, t.sums, t)
    if t.depth == "looped":
        phases_d, phase_d, first, tap_step, count, offset, step, multiple, w_d = of_depth
        od0 = qd * phases_d + phase_d
        id0 = qd * multiple + offset
        for j in range(count):
            ok = row_ok & inside(id0 + j * step, size[0])
            plane = src + (pixel + (id0 + j * step) * steps[1])
            of_tap = weights + w_d.to(tl.int64) * (first + j * tap_step)
            sums = _add_all(sums, plane, of_tap, held, ok, (id0, ih, iw), size, steps, c_src, w_s, ACC, t)
    else:
        od0 = qd * t.phases_d
        id0 = qd * t.step_d
        if t.depth == "unrolled":
            pixel += id0 * steps[1]
        sums = _add_all(sums, src + pixel, weights, held, row_ok, (id0, ih, iw), size, steps, c_src, w_s, ACC, t)

    if HAS_BIAS:  # behind the sums, whose registers they would take
        biases = _biases(bias + to, split, ACC, t.channels, t)
    W: tl.constexpr = t.phases_w if t.lanes == 1 and t.phases_w & (t.phases_w - 1) == 0 else 1  # side by side
    for ad in tl.static_range(tl.constexpr(t.phases_d)):
        out = n * dst_steps[0] + to * dst_steps[1]
        out_ok = row_ok
        if t.depth != "none":
            out += (od0 + ad) * dst_steps[2]
            out_ok = out_ok & (od0 + ad < dst_size[0])
        for ah in tl.static_range(tl.constexpr(t.phases_h)):
            oh = qh * t.phases_h + ah
            for aw in tl.static_range(tl.constexpr(t.phases_w // W)):
                for c in tl.static_range(tl.constexpr(t.channels)):
                    if W == 1:
                        ow = qw * t.phases_w + aw
                        v = sums[((ad * t.phases_h + ah) * t.phases_w + aw) * t.channels + c]
                    else:
                        ow = tile_w * (t.box * W) + tl.arange(0, tl.constexpr(t.box * W))[None, :]
                        v = _joined(sums, ((ad * t.phases_h + ah) * t.phases_w + aw) * t.channels + c, t, W, 1)
                    ok = out_ok & (oh < dst_size[1]) & (ow < dst_size[2])
                    if HAS_BIAS:
                        v += biases[c]
                    at = out + oh * dst_steps[3] + ow * dst_steps[4] + c * dst_steps[1]
                    tl.store(dst + at, v.to(dst.dtype.element_ty), mask=ok)


@triton.jit(repr=_name("tconv_few", "src"), do_not_specialize=GATHER)
def gather_few(
    src, weight, bias, dst,
    batch, c_src, c_dst, groups, d_src, h_src, w_src, d_dst, h_dst, w_dst, kd, strided, padd, dild, gcdd, invd,
    src_n, src_c, src_d, src_h, src_w, dst_n, dst_c, dst_d, dst_h, dst_w, w_g, w_s, w_d, parts, per_part,
    splits, per_split, count,
    FORWARD: tl.constexpr, SRC_WIDTH: tl.constexpr, DST_WIDTH: tl.constexpr, SRC_VECTOR: tl.constexpr, DST_VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """dst[n, co, q*phases + a] = bias[co] + sum over taps of phase a and over ci of src * weight.

    c_src and c_dst are a group's, where channels lie side by side all there are (and groups is 1).  w_g, w_s, w_d: the
    weight's strides along group (or block of lanes), source channel and depth.  A program does per_part tiles, one
    below the other or one after the other along the width, of `parts` such parts.  Of several source channels it takes
    per_split, one of `splits` parts, whose results lie count apart.  SRC_VECTOR and DST_VECTOR divide the
    strides and the width of a tensor along whose width neighbours lie.
    """
    if t.lanes > 1:
        if t.own:
            src_w, src_n, _, src_d, src_h = divisible(src_w, src_n, src_c, src_d, src_h, t.vector)
        dst_w, dst_n, _, dst_d, dst_h = divisible(dst_w, dst_n, dst_c, dst_d, dst_h, t.vector)
        dst_c = 1
        w_g = w_g // 16 * 16
        w_s = w_s // 16 * 16
        w_d = w_d // 16 * 16
    else:
        src_w = 1 if SRC_WIDTH else src_w
        dst_w = 1 if DST_WIDTH else dst_w
        w_src, src_n, src_c, src_d, src_h = divisible(w_src, src_n, src_c, src_d, src_h, SRC_VECTOR)
        w_dst, dst_n, dst_c, dst_d, dst_h = divisible(w_dst, dst_n, dst_c, dst_d, dst_h, DST_VECTOR)
    if t.depth == "looped":
        phases_d = strided if FORWARD else 1
        q_d = tl.cdiv(d_dst, phases_d)
    else:
        phases_d = t.phases_d
        q_d = tl.cdiv(d_dst, t.phases_d)
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
    phase_d = 0
    if t.depth == "looped":
        used_d = tl.minimum(phases_d, d_dst)
        phase_d = pid % used_d
        pid = pid // used_d
        first_d, tap_step_d, count_d, off_d, step_d = axis_taps(phase_d, kd, strided, padd, dild, gcdd, invd, FORWARD)
    tiles, beside = (tiles_w, tiles_r) if t.across else (tiles_r, tiles_w)
    this = pid % beside
    pid = pid // beside
    part = pid % parts
    group = pid // parts
    split = 0
    if t.parted:
        split = group % splits
        group = group // splits

    co0 = block * (t.channels * t.lanes)
    co = _lanes(co0, t)
    source = group * c_src * src_c
    to = co
    if t.lanes == 1:
        to += group * c_dst
        weights = weight + group.to(tl.int64) * w_g + co0.to(tl.int64) * t.weight[0]
    else:
        weights = weight + block * w_g + _lanes(0, t)
        if t.own:
            source = co
    if t.parted:
        first = split * per_split
        source += first * src_c
        weights += first * w_s.to(tl.int64)
        c_src = tl.minimum(per_split, c_src - first)
        dst += split.to(tl.int64) * (count // DST_VECTOR * DST_VECTOR)  # type: ignore[attr-defined]
    held = ()
    if t.held:
        held = _held(weights, ACC, 0, t.kernel[0] * t.kernel[1] * t.kernel[2] * t.channels, t)

    quotient = (rows, q_d, q_h)
    size = (d_src, h_src, w_src)
    steps = (src_c, src_d, src_h, src_w)
    dst_size = (d_dst, h_dst, w_dst)
    dst_steps = (dst_n, dst_c, dst_d, dst_h, dst_w)
    of_depth = ()
    if t.depth == "looped":
        of_depth = (phases_d, phase_d, first_d, tap_step_d, count_d, off_d, step_d, 1 if FORWARD else strided, w_d)  # type: ignore[assignment]
    if t.several:
        for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
            tile_r, tile_w = (this, tile) if t.across else (tile, this)
            _gather_tile(
                src, weights, held, bias, dst, tile_r, tile_w, quotient, size, src_n, steps, source, c_src, dst_size, dst_steps,
                to, w_s, of_depth, split, HAS_BIAS, ACC, t,
            )  # fmt: skip
    else:  # without the loop's registers
        tile_r, tile_w = (this, part) if t.across else (part, this)
        _gather_tile(
            src, weights, held, bias, dst, tile_r, tile_w, quotient, size, src_n, steps, source, c_src, dst_size, dst_steps,
            to, w_s, of_depth, split, HAS_BIAS, ACC, t,
        )  # fmt: skip


@triton.jit(repr=_name("tconv_few_backward_weight", "x"), do_not_specialize=WEIGHT)
def weight_few(
    x, y, partial,
    batch, c_in, c_out, groups, d_in, h_in, w_in, d_out, h_out, w_out, kd, strided, padd, dild,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, per_split,
    X_VECTOR: tl.constexpr, Y_VECTOR: tl.constexpr, ACC: tl.constexpr, t: tl.constexpr,
):  # fmt: skip
    """partial[split, tap, column] = sum over this split's tiles of input pixels of x * y, for all taps of one plane.

    y is the output's gradient; a column is an (input channel, output channel of its group) pair; c_in and c_out are a
    group's.  Where channels lie side by side, both are 1.  X_VECTOR and Y_VECTOR are like SRC_VECTOR of gather_few.
    """
    LAYOUT: tl.constexpr = "vectors" if t.lanes > 1 else "width"
    x_n, x_c, x_d, x_h, x_w = known_strides(x_n, x_c, x_d, x_h, x_w, LAYOUT)
    y_n, y_c, y_d, y_h, y_w = known_strides(y_n, y_c, y_d, y_h, y_w, LAYOUT)
    if t.lanes == 1:
        w_in, x_n, x_c, x_d, x_h = divisible(w_in, x_n, x_c, x_d, x_h, X_VECTOR)
        w_out, y_n, y_c, y_d, y_h = divisible(w_out, y_n, y_c, y_d, y_h, Y_VECTOR)
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

    sums = _zeros(ACC, t.sums, t)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        row, iw = _pixels(tile // tiles_w, tile % tiles_w, t)
        n, id_, ih = _split_row(row, d_in, h_in, t)
        oh = ih * t.step_h
        ow = _columns(tile % tiles_w, iw, t)
        ok_row = row < rows
        of_row = x + (n * x_n + ih * x_h + ci * x_c)
        plane = y + (n * y_n + oh * y_h + ow * y_w + co * y_c)
        if t.depth != "none":
            od = id_ * strided + (tap_d * dild - padd)
            ok_row = ok_row & inside(od, d_out)
            of_row += id_ * x_d
            plane += od * y_d
        ok = ok_row & (iw < w_in)
        of_x = tl.load(of_row + iw * x_w, mask=ok, other=0.0)
        for r in tl.static_range(len(t.reads)):
            ok_h = inside(oh + t.reads[r][1], h_out)
            ok_y = ok_row & ok_h & inside(ow + t.reads[r][2], w_out)
            of_y = _parts(
                widen(tl.load(plane + t.reads[r][1] * y_h + t.reads[r][2] * y_w, mask=ok_y, other=0.0), ACC), t
            )
            for u in tl.static_range(len(t.reads[r][3])):
                # An infinity beside the border multiplies nothing.  Selected after the sum, so that product and sum fuse.
                added = sums[t.reads[r][3][u][1]] + widen(of_x, ACC) * of_y[t.reads[r][3][u][2]]
                there = ok & ok_h & inside(iw * t.step_w + (t.reads[r][2] + t.reads[r][3][u][2]), w_out)
                sums = _put(sums, t.reads[r][3][u][1], tl.where(there, added, sums[t.reads[r][3][u][1]]))
    for r in tl.static_range(tl.constexpr(t.sums)):
        tap = tap_d * t.sums + r
        at = partial + (split.to(tl.int64) * kd * t.sums + tap) * columns
        if t.lanes > 1:
            total = tl.sum(sums[r].to(tl.float64), 0).to(partial.dtype.element_ty)
            tl.store(at + block * t.lanes + tl.arange(0, tl.constexpr(t.lanes)), total)
        else:
            tl.store(at + column, tl.sum(sums[r].to(tl.float64)).to(partial.dtype.element_ty))
