"""Rounding to TF32 by itself: for operands of products that tconv does not form."""

import triton
import triton.language as tl

from .common import round_tf32


@triton.jit(do_not_specialize=["count"])
def round_dense(x, rounded, count, BLOCK: tl.constexpr):
    """Each of `count` fp32 elements of x, rounded to the nearest TF32 value."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rounded + i, round_tf32(tl.load(x + i, mask=i < count)), mask=i < count)
