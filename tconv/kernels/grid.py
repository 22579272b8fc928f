"""A weight's gradient as products of matrices whose sums run along memory (tconv/grid.py says how).

`lay_on_grid` copies an activation onto the grid of pixels that both have; `weight_grid` multiplies two such copies, a tap at a
time, by bulk copies alone.
"""

import triton
import triton.language as tl

from .common import inside, kernel_name, known_channels, known_strides, round_tf32, split_tf32

LAY_SCALARS = (
    "channels images size_d size_h size_w grid_d grid_h grid_w step_d step_h step_w "
    "strided strideh stridew front_d front_h front_w t_n t_c t_d t_h t_w"
).split()


@triton.jit(repr=kernel_name("tconv_lay_on_grid"), do_not_specialize=LAY_SCALARS)
def lay_on_grid(
    src, dst, channels, images, size_d, size_h, size_w, grid_d, grid_h, grid_w,
    step_d, step_h, step_w, strided, strideh, stridew, front_d, front_h, front_w, t_n, t_c, t_d, t_h, t_w,
    SRC_LAYOUT: tl.constexpr, PARTS: tl.constexpr, LOG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dst[phase, channel, i_d, i_h, i_w, image] = src[n, channel, (part * step + i) * stride + phase - front], zero where that is
    outside; image = n * parts + part, of which there is a multiple of 4, and 2^LOG parts.

    PARTS == 2: of each element what TF32 has of it, and behind all of these what it lacks; PARTS == 1: rounded to TF32.
    """
    t_n, t_c, t_d, t_h, t_w = known_strides(t_n, t_c, t_d, t_h, t_w, SRC_LAYOUT)
    channels = known_channels(channels, SRC_LAYOUT)
    images = images // 4 * 4
    # Neighbouring programs read neighbouring pixels, then the other phases of their rows.
    pid = tl.program_id(0)
    tiles_w = tl.cdiv(grid_w * stridew, BLOCK_W)
    j = pid % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W)
    pid = pid // tiles_w
    tiles_i = tl.cdiv(images, BLOCK_I)
    image = pid % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    pid = pid // tiles_i
    tiles_c = tl.cdiv(channels, BLOCK_C)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // tiles_c
    phase_h = pid % strideh
    pid = pid // strideh
    i_h = pid % grid_h
    pid = pid // grid_h
    phase_d = pid % strided
    i_d = pid // strided

    n = image >> LOG
    part = image & ((1 << LOG) - 1)
    i_w = j // stridew
    d = (part * step_d + i_d) * strided + phase_d - front_d
    h = (part * step_h + i_h) * strideh + phase_h - front_h
    first = part * step_w * stridew - front_w
    w = first[:, None] + j[None, :]
    row = n * t_n + d * t_d + h * t_h + first * t_w
    ok = (image < images) & inside(d, size_d) & inside(h, size_h)
    ok = ok[:, None] & inside(w, size_w)
    at = row[:, None] + (j * t_w)[None, :]
    mask = ok[None, :, :] & (c < channels)[:, None, None]
    v = tl.load(src + (c * t_c)[:, None, None] + at[None, :, :], mask=mask, other=0.0)

    pixels = grid_d * grid_h * grid_w * images
    phase = (phase_d * strideh + phase_h) * stridew + j % stridew
    to = ((i_d * grid_h + i_h) * grid_w + i_w) * images
    to = image[:, None] + (phase * channels * pixels + to)[None, :]
    out = dst + (c * pixels)[:, None, None] + to[None, :, :]
    mask = (image < images)[:, None] & (i_w < grid_w)[None, :]
    mask = mask[None, :, :] & (c < channels)[:, None, None]
    if PARTS == 2:
        v, low = split_tf32(v)
        tl.store(out + strided * strideh * stridew * channels * pixels, low, mask=mask)
    else:
        v = round_tf32(v)
    tl.store(out, v, mask=mask)


def _name(specialization):
    c = specialization.constants
    tile = "x".join(str(c[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TAPS"))
    return f"tconv_weight_grid_{'tf32x3' if c['PARTS'] == 2 else 'tf32'}_{tile}"


@triton.jit
def _first_y(
    tap, c_out, kh, kw, strided, strideh, stridew, dild, dilh, dilw, lead_d, lead_h, lead_w, grid_h, grid_w, images
):  # fmt: skip
    """The rows before those of a tap's phase, and how far behind its places are."""
    reach_d = tap // (kh * kw) * dild + lead_d
    reach_h = tap // kw % kh * dilh + lead_h
    reach_w = tap % kw * dilw + lead_w
    phase = (reach_d % strided * strideh + reach_h % strideh) * stridew + reach_w % stridew
    behind = (reach_d // strided * grid_h + reach_h // strideh) * grid_w + reach_w // stridew
    return phase * c_out, behind * images


WEIGHT_SCALARS = (
    "c_in c_out kd kh kw strided strideh stridew dild dilh dilw lead_d lead_h lead_w grid_h grid_w images steps per_split"
).split()


@triton.jit(repr=_name, do_not_specialize=WEIGHT_SCALARS)
def weight_grid(
    x, y, partial, c_in, c_out, kd, kh, kw, strided, strideh, stridew, dild, dilh, dilw, lead_d, lead_h, lead_w,
    grid_h, grid_w, images, steps, per_split,
    PARTS: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, tap, ci, co] = sum over this split's steps of BLOCK_K places on the grid of x[ci] * y[phase, co], y seen as
    far behind as the tap reaches.

    x and y are descriptors of what `lay_on_grid` writes, as [rows, places]: rows are channels, of y those of one phase after
    the other, and with PARTS == 2 there are as many again of what TF32 lacks.  Rows and places beyond are zero or belong to
    others, whose products are not stored.  A program has TAPS taps, for which it reads x once.
    """
    tiles_n = tl.cdiv(c_out, BLOCK_N)
    tiles_m = tl.cdiv(c_in, BLOCK_M)
    taps = kd * kh * kw
    sets = tl.cdiv(taps, TAPS)
    # Programs side by side read the same places: tiles of channels, then taps, then parts of the sum.
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    pid = pid // tiles_n
    first = pid % sets * TAPS
    pid = pid // sets
    row_x = pid % tiles_m * BLOCK_M
    split = pid // tiles_m
    all_y = strided * strideh * stridew * c_out

    rows: tl.tuple = ()
    behind: tl.tuple = ()
    acc: tl.tuple = ()
    cross: tl.tuple = ()
    for i in tl.static_range(TAPS):
        row, places = _first_y(
            tl.minimum(first + i, taps - 1), c_out, kh, kw, strided, strideh, stridew, dild, dilh, dilw,
            lead_d, lead_h, lead_w, grid_h, grid_w, images,
        )  # fmt: skip
        rows += (row + tile_n * BLOCK_N,)
        behind += (places,)
        acc += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        cross += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        k = step * BLOCK_K
        a = x.load([row_x, k])
        if PARTS == 2:
            a_low = x.load([row_x + c_in, k])
        new_acc: tl.tuple = ()
        new_cross: tl.tuple = ()
        for i in tl.static_range(TAPS):
            b = y.load([rows[i], k + behind[i]]).T
            if PARTS == 2:
                # The tensor core truncates as it accumulates, which what TF32 lacks, 2^-11 of the whole, bears; the rest is added up in
                # fp32 (with an accumulator of no such limit Triton would add it up in the tensor core after all).
                b_low = y.load([rows[i] + all_y, k + behind[i]]).T
                both = tl.dot(a_low, b, cross[i], input_precision="tf32")
                new_cross += (tl.dot(a, b_low, both, input_precision="tf32"),)
                high = tl.dot(a, b, input_precision="tf32", max_num_imprecise_acc=BLOCK_K)
                new_acc += (acc[i] + high,)
            else:
                new_acc += (tl.dot(a, b, acc[i], input_precision="tf32"),)
                new_cross += (cross[i],)
        acc = new_acc
        cross = new_cross

    ci = row_x + tl.arange(0, BLOCK_M)
    co = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    place = ci.to(tl.int64)[:, None] * c_out + co[None, :]
    for i in tl.static_range(TAPS):
        out = partial + ((split.to(tl.int64) * taps + first + i) * c_in) * c_out
        mask = (ci < tl.where(first + i < taps, c_in, 0))[:, None] & (co < c_out)[None, :]
        tl.store(out + place, acc[i] + cross[i], mask=mask)
