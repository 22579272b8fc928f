"""The forward pass of layers whose weight is nearly all there is to read, or of few output channels: a GEMM over the weight
as it lies in memory, and the addition of what its columns bring to each output (col2im).  And the gradients of weights that
are mostly writing.

No packing: a tile of pixels reads the weight once, in its own order, in runs of 16 bytes.
"""

import triton
import triton.language as tl

from .common import (
    axis_taps,
    divisible,
    inside,
    kernel_name,
    known_strides,
    load_tile,
    matmul,
    narrow,
    operand,
    split_row,
    widen,
)


@triton.jit(
    repr=kernel_name("tconv_column_gemm"),
    do_not_specialize=(
        "pixels c_src columns groups d_src h_src w_src src_n src_c src_d src_h src_w w_s splits"
    ).split(),
)
def column_gemm(
    src, weight, partial, pixels, c_src, columns, groups, d_src, h_src, w_src, src_n, src_c, src_d, src_h, src_w, w_s,
    splits,
    SRC_LAYOUT: tl.constexpr, VECTOR: tl.constexpr, PLANES: tl.constexpr, ALIGNED: tl.constexpr, BY_PIXEL: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, pixel, group and column] = sum over the split's source channels of src * weight; in memory pixels lie
    side by side if BY_PIXEL, otherwise columns.

    GEMM: M = source pixels of all samples, N = columns, which are the (destination channel, tap) pairs of one group,
    K = source channels; c_src and columns are a group's.  The columns of a source channel lie in memory without gaps, those
    of the next one w_s elements further on.  ALIGNED: whether 16 divides w_s and how many columns there are.
    VECTOR: where channels lie side by side, the power of two, at most 16, that divides their number and the other strides.
    PLANES: 0, or whether the pixels of an image lie side by side, and the power of two, at most 16, that divides their number.
    """
    src_n, src_c, src_d, src_h, src_w = known_strides(src_n, src_c, src_d, src_h, src_w, SRC_LAYOUT)
    if SRC_LAYOUT == "channels" or SRC_LAYOUT == "vectors":
        c_src, src_n, src_w, src_d, src_h = divisible(c_src, src_n, src_w, src_d, src_h, VECTOR)
    of_image = d_src * h_src * w_src
    if ALIGNED:
        w_s = w_s // 16 * 16
        columns = columns // 16 * 16
    if PLANES:
        of_image = of_image // PLANES * PLANES
        pixels = pixels // PLANES * PLANES
        src_n = src_n // PLANES * PLANES
        src_c = src_c // PLANES * PLANES
        tiles = tl.cdiv(of_image, BLOCK_M)  # of planes, each has its own
        tiles_m = pixels // of_image * tiles
    else:
        tiles_m = tl.cdiv(pixels, BLOCK_M)
    # What reads the same part of the weight is neighbours.
    tiles_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    tile_m = pid % tiles_m
    pid = pid // tiles_m
    tile_n = pid % tiles_n
    pid = pid // tiles_n
    split = pid % splits
    group = pid // splits
    if PLANES:
        p = tile_m % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel_ok = p < of_image
        pixel = tile_m // tiles * src_n + p
        p += tile_m // tiles * of_image
    else:
        p = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        pixel_ok = p < pixels
        n, d, h = split_row(p // w_src, d_src, h_src)
        pixel = n * src_n + d * src_d + h * src_h + p % w_src * src_w
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < columns
    k = tl.arange(0, BLOCK_K)
    src += group * c_src * src_c
    weight += group.to(tl.int64) * c_src * w_s

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    steps = tl.cdiv(c_src, BLOCK_K)
    for step in range(split * steps // splits, (split + 1) * steps // splits):
        c = step * BLOCK_K + k
        c_ok = c < c_src
        # A plane's pixels are known to be neighbours; transposed, Triton 3.9 copies those of TF32 4 bytes at a time.
        a = load_tile(
            src,
            pixel,
            c * src_c,
            pixel_ok[:, None] & c_ok[None, :],
            "channels" if PLANES and PRECISION == "tf32" else SRC_LAYOUT,
        )
        of_channel = c.to(tl.int64)[:, None] * w_s
        b = tl.load(weight + of_channel + column[None, :], mask=c_ok[:, None] & column_ok[None, :], other=0.0)
        acc = matmul(operand(a, PRECISION), operand(b, PRECISION), acc, PRECISION)

    mask = pixel_ok[:, None] & column_ok[None, :]
    all_columns = groups * columns
    partial += split * pixels * all_columns
    if BY_PIXEL:
        tl.store(partial + (p[:, None] + (group * columns + column)[None, :] * pixels), acc, mask=mask)
    else:
        tl.store(partial + (p[:, None] * all_columns + (group * columns + column)[None, :]), acc, mask=mask)


@triton.jit
def _reaching(q, phase, size, kernel, stride, padding, dilation, gcd, inverse):
    """The taps that bring outputs q * stride + phase of one axis something from inside the input: (first tap, tap step, how
    many at most, first input, input step).  The last of them may lie before the input."""
    first, tap_step, count, offset, step = axis_taps(phase, kernel, stride, padding, dilation, gcd, inverse, True)
    i = q + offset
    beyond = tl.maximum(i - size - step, 0) // -step  # inputs go down: so many of the first lie behind the last one
    return first + beyond * tap_step, tap_step, count - beyond, i + beyond * step, step


@triton.jit(
    do_not_specialize=(
        "batch c_dst groups d_src h_src w_src d_dst h_dst w_dst "
        "kd kh kw strided strideh stridew padd padh padw dild dilh dilw gcdd gcdh gcdw invd invh invw "
        "most_d most_h most_w dst_n dst_c dst_d dst_h dst_w of_channel of_tap"
    ).split()
)
def add_columns(
    partial, bias, dst, batch, c_dst, groups, d_src, h_src, w_src, d_dst, h_dst, w_dst,
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw, gcdd, gcdh, gcdw, invd, invh, invw,
    most_d, most_h, most_w, dst_n, dst_c, dst_d, dst_h, dst_w, of_channel, of_tap,
    CHANNELS: tl.constexpr, BY_PIXEL: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dst[n, co, o] = bias[co] + sum over the taps that reach o, and over splits, of partial[split, pixel, column].

    A program has outputs of one phase, whose taps are the same: what they are is worked out once, not for each output.  They are
    ROWS rows of BLOCK, so that where a row lies is worked out once as well; or, where rows are short, ROWS = 0 and BLOCK outputs of
    as many rows as it takes.  Along an axis at most most_ taps reach an output.  c_dst is a group's; of_channel and of_tap are
    how many columns lie between its destination channels and between its taps.  A row is of CHANNELS, or along the width.
    """
    q_d = tl.cdiv(d_dst, strided)
    q_h = tl.cdiv(h_dst, strideh)
    q_w = tl.cdiv(w_dst, stridew)
    channels = groups * c_dst
    # A stride beyond the output's size has phases without outputs.
    used_h = tl.minimum(strideh, h_dst)
    used_w = tl.minimum(stridew, w_dst)
    pid = tl.program_id(0)
    phase_w = pid % used_w
    pid = pid // used_w
    phase_h = pid % used_h
    pid = pid // used_h
    used_d = tl.minimum(strided, d_dst)
    phase_d = pid % used_d
    pid = pid // used_d
    length = channels if CHANNELS else q_w
    if ROWS:
        blocks = tl.cdiv(length, BLOCK)
        along = (pid % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
        row = (pid // blocks * ROWS + tl.arange(0, ROWS))[:, None]
        acc = tl.zeros((ROWS, BLOCK), tl.float64)
    else:
        along = pid * BLOCK + tl.arange(0, BLOCK)
        row = along // length
        along = along % length
        acc = tl.zeros((BLOCK,), tl.float64)
    if CHANNELS:
        channel = along
        qw = row % q_w
        n, qd, qh = split_row(row // q_w, q_d, q_h)
        ok = channel < channels
    else:
        qw = along
        row, qd, qh = split_row(row, q_d, q_h)
        channel = row % channels
        n = row // channels
        ok = qw < q_w
    od = qd * strided + phase_d
    oh = qh * strideh + phase_h
    ow = qw * stridew + phase_w
    ok &= (n < batch) & (od < d_dst) & (oh < h_dst) & (ow < w_dst)
    td, tap_step_d, count_d, id0, step_d = _reaching(qd, phase_d, d_src, kd, strided, padd, dild, gcdd, invd)
    th, tap_step_h, count_h, ih0, step_h = _reaching(qh, phase_h, h_src, kh, strideh, padh, dilh, gcdh, invh)
    tw, tap_step_w, count_w, iw0, step_w = _reaching(qw, phase_w, w_src, kw, stridew, padw, dilw, gcdw, invw)
    columns = channels * kd * kh * kw
    pixels = batch * d_src * h_src * w_src
    column = channel // c_dst * c_dst * kd * kh * kw + channel % c_dst * of_channel
    for jd in range(most_d):
        d = id0 + jd * step_d
        plane_ok = ok & (jd < count_d) & (d >= 0)
        for jh in range(most_h):
            h = ih0 + jh * step_h
            row_ok = plane_ok & (jh < count_h) & (h >= 0)
            first = ((td + jd * tap_step_d) * kh + th + jh * tap_step_h) * kw + tw
            row = ((n * d_src + d) * h_src + h) * w_src
            for jw in range(most_w):
                w = iw0 + jw * step_w
                reached = row_ok & (jw < count_w) & (w >= 0)
                of = column + (first + jw * tap_step_w) * of_tap
                if BY_PIXEL:
                    at = partial + (of * pixels + row + w)
                else:
                    at = partial + ((row + w) * columns + of)
                for split in tl.static_range(SPLITS):  # so that all are on their way together
                    acc += tl.load(at + split * pixels * columns, mask=reached, other=0.0).to(tl.float64)
    if HAS_BIAS:
        acc += widen(tl.load(bias + channel, mask=channel < channels, other=0.0), tl.float64)
    out = n * dst_n + channel * dst_c + od * dst_d + oh * dst_h + ow * dst_w
    tl.store(dst + out, narrow(acc, dst.dtype.element_ty), mask=ok)


@triton.jit(
    repr=kernel_name("tconv_weight_columns"),
    do_not_specialize=(
        "pixels c_in c_out columns d_in h_in w_in d_out h_out w_out kd kh kw strided strideh stridew padd padh padw "
        "dild dilh dilw x_n x_c x_d x_h x_w y_n y_c y_d y_h y_w of_channel of_tap splits count"
    ).split(),
)
def weight_columns(
    x, y, grad, pixels, c_in, c_out, columns, d_in, h_in, w_in, d_out, h_out, w_out,
    kd, kh, kw, strided, strideh, stridew, padd, padh, padw, dild, dilh, dilw,
    x_n, x_c, x_d, x_h, x_w, y_n, y_c, y_d, y_h, y_w, of_channel, of_tap, splits, count,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad[split, channel, column] = sum over the split's part of the input's pixels of x * y: the weight's gradient where
    pixels are few or taps many, in the order in which it lies.  Results of splits lie count apart.

    y is the output's gradient; a column is an (output channel, tap) pair of a group, of_channel and of_tap how many columns
    lie between its channels and between its taps; c_in, c_out and columns are a group's.  Multiply-adds, a tile [BLOCK_M input
    channels, BLOCK_N columns] a program.  ALIGNED: whether 16 divides columns.
    UNROLL pixels' loads are on their way together; BLOCKS: 16 times as many are added up before they are added in float64.
    """
    if ALIGNED:
        columns = columns // 16 * 16
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles_m = tl.cdiv(c_in, BLOCK_M)
    pid = tl.program_id(0)
    column = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tiles_n
    ci = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    group = pid // splits
    split = pid % splits
    column_ok = column < columns
    ci_ok = ci < c_in
    taps = kd * kh * kw
    tap = column // of_tap % taps
    # Where this column's products lie for the first pixel.
    td = tap // (kh * kw) * dild - padd
    th = tap // kw % kh * dilh - padh
    tw = tap % kw * dilw - padw
    of_y = (group * c_out + column // of_channel % c_out) * y_c + td * y_d + th * y_h + tw * y_w
    of_x = (group * c_in + ci) * x_c

    steps = tl.cdiv(pixels, UNROLL)
    begin = split * steps // splits
    end = (split + 1) * steps // splits
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if BLOCKS else ACC)
    for block in range(begin, end, 16 if BLOCKS else 1):
        some = tl.zeros((BLOCK_M, BLOCK_N), ACC) if BLOCKS else acc
        for step in range(block, tl.minimum(block + 16, end) if BLOCKS else block + 1):
            for u in tl.static_range(UNROLL):
                p = tl.minimum(step * UNROLL + u, pixels - 1)
                depth = tl.where(step * UNROLL + u < pixels, d_out, 0)  # beyond the last pixel nothing is inside
                n, d, h = split_row(p // w_in, d_in, h_in)
                w = p % w_in
                at_x = n * x_n + d * x_d + h * x_h + w * x_w
                at_y = n * y_n + d * strided * y_d + h * strideh * y_h + w * stridew * y_w
                reached = column_ok & inside(td + d * strided, depth) & inside(th + h * strideh, h_out)
                reached &= inside(tw + w * stridew, w_out)
                a = widen(tl.load(x + (at_x + of_x), mask=ci_ok, other=0.0), ACC)
                b = widen(tl.load(y + (at_y + of_y), mask=reached, other=0.0), ACC)
                # An infinity beside the border multiplies nothing.
                some = tl.where(reached[None, :], some + a[:, None] * b[None, :], some)
        if BLOCKS:
            acc += widen(some, tl.float64)
        else:
            acc = some

    grad += split.to(tl.int64) * count
    out = grad + ((group * c_in + ci).to(tl.int64) * columns)[:, None] + column[None, :]
    tl.store(out, narrow(acc, grad.dtype.element_ty), mask=ci_ok[:, None] & column_ok[None, :])
