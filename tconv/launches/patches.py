"""The patch kernel's launches."""

from __future__ import annotations

from .. import patches
from ..configs import cdiv
from ..geometry import Geometry, sizes3
from ..layouts import column_steps, layout, strides5, vector
from ..problem import Plan
from ..record import Record
from .common import accumulator, axis_scalars
from .sums import partial_sums, sum_splits


def backward_weight(noted: Record, chosen: Plan, input, grad_output, grad_weight, geometry: Geometry) -> None:
    """Launch the patch kernel, and what adds its parts; 1-d and 2-d layers run as 3-d ones."""
    from ..kernels.patches import patch_weight

    tile, splits, kind, axes = chosen.config, chosen.splits, layout(input), geometry.axes3
    assert isinstance(tile, patches.Patches)
    (batch, c_in), c_out, (_, kh, kw) = input.shape[:2], grad_output.shape[1], (a.kernel for a in axes)
    to = partial_sums(noted, grad_weight, splits)
    noted.launch(
        patch_weight, splits * cdiv(c_in, tile.channels),
        grad_output, input, to, batch, c_in, c_out, *sizes3(input.shape[2:]), *sizes3(grad_output.shape[2:]),
        kh, kw, geometry.taps, *axis_scalars(geometry, inverse=False)[3:], *strides5(input), *strides5(grad_output),
        *column_steps(grad_weight), chosen.tiles_per_split, grad_weight.numel(),
        X_LAYOUT=kind,
        VECTOR=vector(input, kind) if kind == "width" else 1,
        PRECISION=chosen.precision,
        ACC=accumulator(input.dtype),
        BLOCK_M=tile.channels,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.pixels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    sum_splits(noted, to, grad_weight)
