"""Copies of activations: rounded, for products that tconv does not form, or laid out as bulk copies take them."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .common import round_tf32


@triton.jit(do_not_specialize=["count"])
def round_dense(x, rounded, count, BLOCK: tl.constexpr):
    """Each of `count` fp32 elements of x, rounded to the nearest TF32 value."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rounded + i, round_tf32(tl.load(x + i, mask=i < count)), mask=i < count)


def _name(specialization):
    c = specialization.constants
    source = "channels" if c["LAST"] else "width"
    return f"tconv_arrange_{source}{'_tf32' if c['ROUND'] else ''}_{c['BLOCK_P']}x{c['BLOCK_C']}"


@triton.jit(repr=_name, do_not_specialize=["pixels", "channels", "pieces"])
def arrange(
    x,
    arranged,
    pixels,
    channels,
    pieces,
    LAST: tl.constexpr,
    ROUND: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    """arranged[image, pixel, channel] = x[image, channel, pixel] (LAST: x[image, pixel, channel]) in `pieces` of PIECE channels,
    which is 16 bytes, zeros beyond x's; with ROUND rounded to TF32.  VECTOR divides x's contiguous axis.
    EARLY: as of kernels.pack, and whether it began before the launch before it had ended, which it awaits for the next one."""
    if EARLY:
        gdc_launch_dependents()
    pitch = pieces * PIECE
    if LAST:
        channels = channels // VECTOR * VECTOR
    else:
        pixels = pixels // VECTOR * VECTOR
    tiles_p = tl.cdiv(pixels, BLOCK_P)
    tiles_c = tl.cdiv(pitch, BLOCK_C)
    tile = tl.program_id(0)
    p = tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tile // tiles_p % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tile // tiles_p // tiles_c
    if LAST:
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        v = tl.load(x + ((image * pixels + p) * channels)[:, None] + c[None, :], mask=mask, other=0.0)
    else:
        mask = (c < channels)[:, None] & (p < pixels)[None, :]
        v = tl.trans(tl.load(x + ((image * channels + c) * pixels)[:, None] + p[None, :], mask=mask, other=0.0))
    if ROUND:
        v = round_tf32(v)
    mask = (p < pixels)[:, None] & (c < pitch)[None, :]
    tl.store(arranged + ((image * pixels + p) * pitch)[:, None] + c[None, :], v, mask=mask)
    if EARLY:
        gdc_wait()
