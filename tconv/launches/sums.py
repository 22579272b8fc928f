"""Sums in parts: their workspaces, and the launches that add them."""

from __future__ import annotations

import torch

from ..configs import cdiv, power_of_two
from ..layouts import order_of
from ..record import Record
from .common import of_partials

FEW_SUMS = 1 << 17  # results of a second stage
MANY_SPLITS = 16  # beyond, several side by side also of many results


def partial_sums(noted: Record, result: torch.Tensor, splits: int) -> torch.Tensor:
    """A workspace for so many whole results, as a gather in parts writes them: dense, in the result's order.  Of one part the
    result itself."""
    if splits == 1:
        return result
    return noted.workspace((splits, result.numel()), of_partials(result.dtype), result)


def sum_splits(noted: Record, partial: torch.Tensor, result: torch.Tensor) -> None:
    """Launch what adds partial_sums, where there are several."""
    if partial is result:
        return
    from ..kernels import reduce

    splits, count = partial.shape
    rows, block = _sums(count, splits)
    noted.launch(reduce.sum_splits, cdiv(count, block), partial, result, count, splits, ROWS=rows, BLOCK=block)


def _sums(count: int, splits: int) -> tuple[int, int]:
    """(splits, results) that a program of kernels.reduce adds side by side: of few results one program would go through
    hundreds of splits one after the other (64 channels of k4, 512 splits: 0.15 ms)."""
    if count > FEW_SUMS:
        return (1, 1024) if splits <= MANY_SPLITS else (8, 128)
    return 8 if splits <= 8 else 128, 32


def sum_partials(noted: Record, partials, grad, strides, c_out, axes) -> None:
    from ..kernels import reduce

    splits, taps, columns = partials.shape
    _, kh, kw = (a.kernel for a in axes) if axes else (1, 1, 1)
    rows, results = _sums(taps * columns, splits)
    # Of a dense gradient a program writes whole runs of taps.
    kernel = [a.kernel for a in axes or ()]
    dense = (
        bool(axes) and strides[0] in (0, c_out * taps) and order_of(strides[1], strides[2:], c_out, kernel) == "taps"
    )
    of_taps = power_of_two(taps, 1, 16) if dense and rows == 1 else 1
    block = results // of_taps
    noted.launch(
        reduce.sum_partials, cdiv(taps, of_taps) * cdiv(columns, block),
        partials, grad, splits, taps, columns, c_out, kh, kw, *strides,
        DENSE=dense,
        ROWS=rows,
        TAPS=of_taps,
        BLOCK=block,
    )  # fmt: skip
