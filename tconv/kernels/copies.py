"""Copies of activations and weights: laid out as bulk copies and cuDNN take them, rounded where they are to be TF32."""

import triton
import triton.language as tl

from .common import gdc_launch_dependents, gdc_wait, round_tf32


def _name(specialization):
    c = specialization.constants
    source = "channels" if c["LAST"] else "width"
    return f"tconv_arrange_{source}{'_tf32' if c['ROUND'] else ''}_{c['BLOCK_P']}x{c['BLOCK_C']}"


@triton.jit(
    repr=_name, do_not_specialize=["pixels", "channels", "pieces", "height", "width", "rows", "pitch", "padded"]
)
def arrange(
    x,
    arranged,
    pixels,
    channels,
    pieces,
    height,
    width,
    rows,
    pitch,
    padded,
    LAST: tl.constexpr,
    ROUND: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """arranged[image, pixel, channel] = x[image, channel, pixel] (LAST: x[image, pixel, channel]) in `pieces` of PIECE channels,
    which is 16 bytes, zeros beyond x's; with ROUND rounded to TF32.  VECTOR divides x's contiguous axis, and `pitch` where that
    is the width.
    PADDED: an image has `padded` pixels, in planes of `rows` rows of `pitch`, of which x has `height` of `width`; zeros beyond.
    OVERLAPS: it begins before the launch ahead of it has ended and lets the next one begin, for which it waits at its end."""
    if OVERLAPS:
        gdc_launch_dependents()
    all_channels = pieces * PIECE
    if LAST:
        channels = channels // VECTOR * VECTOR
    else:
        pixels = pixels // VECTOR * VECTOR
        width = width // VECTOR * VECTOR
        pitch = pitch // VECTOR * VECTOR
    tiles_p = tl.cdiv(padded, BLOCK_P)
    tiles_c = tl.cdiv(all_channels, BLOCK_C)
    tile = tl.program_id(0)
    p = tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tile // tiles_p % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tile // tiles_p // tiles_c
    at = p
    there = p < pixels
    if PADDED:
        w = p % pitch
        h = p // pitch % rows
        d = p // pitch // rows
        at = (d * height + h) * width + w
        there = (w < width) & (h < height) & (at < pixels)
    if LAST:
        mask = there[:, None] & (c < channels)[None, :]
        v = tl.load(x + ((image * pixels + at) * channels)[:, None] + c[None, :], mask=mask, other=0.0)
    else:
        mask = (c < channels)[:, None] & there[None, :]
        v = tl.trans(tl.load(x + ((image * channels + c) * pixels)[:, None] + at[None, :], mask=mask, other=0.0))
    if ROUND:
        v = round_tf32(v)
    mask = (p < padded)[:, None] & (c < all_channels)[None, :]
    tl.store(arranged + ((image * padded + p) * all_channels)[:, None] + c[None, :], v, mask=mask)
    if OVERLAPS:
        gdc_wait()
