"""The weight as the matrix kernels take it: source channels innermost, rows of destination channels, a block a tap."""

import triton
import triton.language as tl

from .common import gdc_launch_dependents, round_tf32, split_tf32


@triton.jit(
    do_not_specialize=(
        "c_src c_dst taps kh kw w_g w_s w_t w_d w_h w_w width height rows stride padding dilation "
        "entries base0 first1 base1 first2 base2 first3 base3"
    ).split()
)
def pack_weight(
    weight, packed, c_src, c_dst, taps, kh, kw, w_g, w_s, w_t, w_d, w_h, w_w, width, height, rows,
    stride, padding, dilation, entries, base0, first1, base1, first2, base2, first3, base3,
    PHASES: tl.constexpr, PARTS: tl.constexpr, ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """packed[part, group, tap, c_dst, c_src], c_dst and c_src zero-padded to `height` and `width`, a multiple of 16; fp32 as
    PARTS TF32 values (0: as it is, one part), of which each has so many `rows`.

    With PHASES > 1, which has one group: packed[part, tap of depth and height, one of `entries` offsets along the width,
    c_dst and phase, c_src].  Accumulator g of tconv.shift.Fold has the phases from first<g> on, and offset d at base<g> + d;
    row c % (64 / PHASES) * PHASES + f of a tile of 64 is phase f of channel c.  What a row holds that has no such phase is
    left open: its output does not exist.

    w_g, w_s, w_t: the weight's strides along group, source channel and destination channel; w_d, w_h, w_w: of taps.
    Of one source channel, its (c_dst, taps) lie in memory as ORDER says: "taps" or "channels" innermost without gaps, or
    "strided".  ALIGNED: whether 16 divides w_g, w_s and how many those are, or in "channels" c_dst.
    A program takes BLOCK_R of these of BLOCK_C source channels, so that it reads and writes runs of addresses.
    EARLY: whether the next launch may begin before this one ends, and waits for it by itself (on Hopper GPUs).
    """
    if EARLY:
        gdc_launch_dependents()
    CHANNELS: tl.constexpr = 64 // PHASES  # of a folded tile
    width = width // 16 * 16  # for the compiler
    if ALIGNED:
        w_g = w_g // 16 * 16
        w_s = w_s // 16 * 16
    pid = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    if ORDER == "channels":
        c_run = c_dst // 16 * 16 if ALIGNED else c_dst
        tiles_r = tl.cdiv(height, BLOCK_R)
        t = pid // tiles_r % taps
        r += pid % tiles_r * BLOCK_R
        pid = pid // tiles_r // taps
        run = t * c_run + r
        co = r
        present = r < c_run
        inside = r < height
        t += tl.zeros_like(r)
    else:
        tiles_r = tl.cdiv(height * taps, BLOCK_R)
        r += pid % tiles_r * BLOCK_R
        pid = pid // tiles_r
        co = r // taps
        t = r % taps
        if ORDER == "taps":
            total = c_dst * taps // 16 * 16 if ALIGNED else c_dst * taps
            run = r
            present = r < total
        else:
            run = co.to(tl.int64) * w_t + (t // (kh * kw)).to(tl.int64) * w_d
            run += (t // kw % kh).to(tl.int64) * w_h + (t % kw).to(tl.int64) * w_w
            present = co < c_dst
        inside = r < height * taps
    tiles_c = tl.cdiv(width, BLOCK_C)
    group = (pid // tiles_c).to(tl.int64)
    cs = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (cs < c_src)[:, None] & present[None, :]
    v = tl.load(weight + group * w_g + cs.to(tl.int64)[:, None] * w_s + run[None, :], mask=mask, other=0.0)

    if PHASES > 1:
        # Tap k is of the phase that is dilation * k - padding modulo the stride; output q * stride + phase reads input
        # q + offset through it.
        reach = dilation * (t % kw) - padding
        phase = (reach % stride + stride) % stride
        offset = (phase - reach) // stride  # which divides it
        # The first phase of its accumulator, and the block of weights of offset 0.
        first = tl.where(
            phase >= first3, first3, tl.where(phase >= first2, first2, tl.where(phase >= first1, first1, 0))
        )
        base = tl.where(
            phase >= first3, base3, tl.where(phase >= first2, base2, tl.where(phase >= first1, base1, base0))
        )
        row = (t // kw * entries + base + offset) * (height // CHANNELS) + co // CHANNELS
        row = row * 64 + co % CHANNELS * PHASES + phase - first
    else:
        row = (group * taps + t) * height + co
    out = packed + row.to(tl.int64)[:, None] * width + cs[None, :]
    mask = inside[:, None] & (cs < width)[None, :]
    if PARTS == 2:
        v, low = split_tf32(v)
        tl.store(out + rows.to(tl.int64) * width, tl.trans(low), mask=mask)
    if PARTS == 1:
        v = round_tf32(v)
    tl.store(out, tl.trans(v), mask=mask)
