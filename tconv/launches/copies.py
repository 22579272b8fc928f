"""Copies of activations and weights in another memory format."""

from __future__ import annotations

from math import gcd, prod

import torch

from ..configs import cdiv, power_of_two
from ..geometry import sizes3
from ..layouts import is_channels_last
from ..record import Record, on_device
from .common import OVERLAPPING


def last_form(t: torch.Tensor) -> tuple[tuple[int, ...], torch.memory_format]:
    """(size, memory format) of an activation's or weight's copy with its second dimension innermost; those of 1-d layers have a
    height of 1 then."""
    size = t.shape[2:] if t.ndim > 3 else (1, t.shape[2])
    return (*t.shape[:2], *size), torch.channels_last if len(size) == 2 else torch.channels_last_3d


def transpose(noted: Record, t, copy, rows: int, columns: int, is_tf32: bool) -> None:
    """Write t, for each image [row, column] in memory, as [column, row]: rows are what `arrange` calls channels."""
    from ..kernels import copies as kernels

    piece = 16 // t.element_size()
    block_c = power_of_two(rows, 16, 4096 // power_of_two(columns, 16, 64))
    block_p = power_of_two(columns, 16, 4096 // block_c)
    with on_device(t):
        noted.launch(
            kernels.arrange, t.shape[0] * cdiv(columns, block_p) * cdiv(rows, block_c),
            t, copy, columns, rows, rows // piece, 1, columns, 1, columns, columns,
            LAST=False, ROUND=is_tf32, VECTOR=gcd(columns, piece), PIECE=piece, BLOCK_P=block_p, BLOCK_C=block_c, PADDED=False,
            OVERLAPS=False,
        )  # fmt: skip


def arrange(noted: Record, t: torch.Tensor, arranged: torch.Tensor, is_tf32: bool, packing: bool) -> None:
    """Write a dense activation as [image, plane, row, pixel, channel], with zeros up to arranged's size, rounded if it is to be
    TF32: what bulk copies take.  packing: whether it is launched next after a weight's packing, beside which it runs and after
    which it ends."""
    from ..kernels import copies as kernels

    channels, size, (batch, *padded, pitch) = t.shape[1], sizes3(t.shape[2:]), arranged.shape
    pixels, piece, last = prod(size), 16 // t.element_size(), is_channels_last(t)
    is_padded = tuple(padded) != size
    block_p = power_of_two(prod(padded), 16, 64)
    block_c = power_of_two(channels, 16, 4096 // block_p)
    grid = batch * cdiv(prod(padded), block_p) * cdiv(pitch, block_c)
    along = channels if last else gcd(size[2], padded[2]) if is_padded else pixels
    noted.launch(
        kernels.arrange, grid, t, arranged, pixels, channels, pitch // piece, *size[1:], *padded[1:], prod(padded),
        LAST=last, ROUND=is_tf32, VECTOR=gcd(along, piece), PIECE=piece, BLOCK_P=block_p, BLOCK_C=block_c, PADDED=is_padded,
        OVERLAPS=True,
        **(OVERLAPPING if packing else {}),
    )  # fmt: skip
