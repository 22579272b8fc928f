"""The forward pass of few output channels, in strips: all taps of all output channels are the columns of one product, which reads
the input once, and what of them each output sums (col2im) is added before it leaves the L2.

A program walks down a strip of the input.  At each step it multiplies some rows, puts their columns into a ring of its own, of the
last rows, and adds up the outputs that these rows complete.  The ring is global memory, at most 40 MB for the whole GPU
(rows.RINGS), since it is read at places that shared memory, in Triton, cannot be read at.
"""

import triton
import triton.language as tl

from .common import divisible, kernel_name, known_strides, load_tile, matmul, narrow, operand, widen

SCALARS = (
    "strips tiles_w chunks chunk_rows first_h first_w rows_q inner_w back_w warm c_src h_src w_src h_dst w_dst padh padw "
    "src_n src_c src_h src_w dst_n dst_c dst_h dst_w"
).split()


@triton.jit(repr=kernel_name("tconv_column_rows"), do_not_specialize=SCALARS)
def column_rows(
    src, weight, bias, dst, ring, strips, tiles_w, chunks, chunk_rows, first_h, first_w, rows_q, inner_w, back_w, warm,
    c_src, h_src, w_src, h_dst, w_dst, padh, padw, src_n, src_c, src_h, src_w, dst_n, dst_c, dst_h, dst_w,
    C_DST: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr,
    SRC_LAYOUT: tl.constexpr, VECTOR: tl.constexpr, PIECE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dst[n, co, o] = bias[co] + sum over taps and input channels of src * weight, o = q * stride + phase - padding.

    q is reached by inputs from q back to where the last tap lies.  A strip has inner_w of them along the width, for which a step
    reads WIDTH input pixels, back_w of them before the first q; a chunk of a strip has chunk_rows along the height, and begins
    `warm` rows before them; first_h and first_w are the first q, rows_q is how many there are.
    The ring has RING rows: at least the ROWS of a step and those before it that its outputs need.
    The weight is packed (launches.weights.pack): a row of input channels for each column, which is a (tap, output channel) pair.
    The layer is known at compile time, so that what an output sums is a list of places.
    VECTOR: as in column_gemm; PIECE: of a contiguous source, the power of two that divides its strides and a strip's places.
    """
    src_n, src_c, _, src_h, src_w = known_strides(src_n, src_c, 0, src_h, src_w, SRC_LAYOUT)
    if SRC_LAYOUT == "channels" or SRC_LAYOUT == "vectors":
        c_src, src_n, src_w, src_h, _ = divisible(c_src, src_n, src_w, src_h, 0, VECTOR)
    else:
        w_src, src_n, src_c, src_h, inner_w = divisible(w_src, src_n, src_c, src_h, inner_w, PIECE)
    padded = tl.cdiv(c_src, BLOCK_K) * BLOCK_K
    COLUMNS: tl.constexpr = C_DST * KH * KW
    p = tl.arange(0, ROWS * WIDTH)
    r = p // WIDTH
    along = p % WIDTH
    column = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    ring += tl.program_id(0) * (COLUMNS * RING * WIDTH)

    for strip in range(tl.program_id(0), strips, tl.num_programs(0)):
        tile_w = strip % tiles_w
        begin = first_h + strip // tiles_w % chunks * chunk_rows
        end = tl.minimum(begin + chunk_rows, first_h + rows_q)
        n = strip // tiles_w // chunks
        w = (first_w - back_w) // PIECE * PIECE + tile_w * inner_w + along
        w_ok = (w >= 0) & (w < w_src)
        q_w = w + back_w
        for row in range(tl.where(begin > 0, begin - warm, begin), end, ROWS):
            h = row + r
            ok = w_ok & (h >= 0) & (h < h_src)
            pixel = n * src_n + h * src_h + w * src_w
            acc = tl.zeros((ROWS * WIDTH, BLOCK_N), ACC)
            for first in range(0, c_src, BLOCK_K):
                c = first + k
                c_ok = c < c_src
                # As in column_gemm.
                layout: tl.constexpr = "channels" if PIECE > 1 and PRECISION == "tf32" else SRC_LAYOUT
                a = load_tile(src, pixel, c * src_c, ok[:, None] & c_ok[None, :], layout)
                b = tl.load(
                    weight + (column[:, None] * padded + c[None, :]), mask=(column < COLUMNS)[:, None], other=0.0
                )
                b = b if PRECISION == "tf32" else operand(b, PRECISION)  # TF32 is rounded when it is packed
                acc = matmul(operand(a, PRECISION), b.T, acc, PRECISION)
            slot = (h & (RING - 1)) * WIDTH + along
            tl.debug_barrier()  # what was there has been read
            to = ring + (column[None, :] * (RING * WIDTH) + slot[:, None])
            tl.store(to, acc, mask=ok[:, None] & (column < COLUMNS)[None, :])
            tl.debug_barrier()
            if row >= begin:
                q_ok = (along < inner_w) & (h < end)
                for phase_h in tl.static_range(STRIDE_H):
                    o_h = h * STRIDE_H + phase_h - padh
                    h_ok = q_ok & (o_h >= 0) & (o_h < h_dst)
                    for phase_w in tl.static_range(STRIDE_W):
                        o_w = q_w * STRIDE_W + phase_w - padw
                        written = h_ok & (o_w >= 0) & (o_w < w_dst)
                        for co in tl.static_range(C_DST):
                            total = tl.zeros((ROWS * WIDTH,), ACC)
                            for th in tl.static_range(KH):
                                if (th * DIL_H - phase_h) % STRIDE_H == 0:
                                    ih = h - (th * DIL_H - phase_h) // STRIDE_H
                                    reached = q_ok & (ih >= 0) & (ih < h_src)
                                    place = (ih & (RING - 1)) * WIDTH + along + back_w
                                    for tw in tl.static_range(KW):
                                        if (tw * DIL_W - phase_w) % STRIDE_W == 0:
                                            shift = (tw * DIL_W - phase_w) // STRIDE_W
                                            iw = q_w - shift
                                            there = reached & (iw >= 0) & (iw < w_src)
                                            of = (th * KW + tw) * C_DST + co
                                            at = ring + place + (of * (RING * WIDTH) - shift)
                                            total += tl.load(at, mask=there, other=0.0)
                            if HAS_BIAS:
                                total += widen(tl.load(bias + co), ACC)
                            out = n * dst_n + co * dst_c + o_h * dst_h + o_w * dst_w
                            tl.store(dst + out, narrow(total, dst.dtype.element_ty), mask=written)
