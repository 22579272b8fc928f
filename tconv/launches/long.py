"""The long-stride kernels' launches."""

from __future__ import annotations

from math import prod

from .. import long
from ..configs import cdiv
from ..geometry import Geometry, sizes3
from ..layouts import is_channels_last, strides5
from ..problem import Plan
from ..record import Record
from .common import accumulator, axis_scalars
from .sums import partial_sums, sum_splits


def forward(noted: Record, chosen: Plan, input, weight, bias, output, geometry: Geometry) -> None:
    """Launch the long-stride kernel of the forward pass; 1-d and 2-d layers run as 3-d ones of one row or plane."""
    from ..kernels.long import gather_phases

    tile, g, axes = chosen.config, geometry.groups, geometry.axes3
    assert isinstance(tile, long.Phases)
    c_in, c_out, out = input.shape[1] // g, output.shape[1] // g, sizes3(output.shape[2:])
    *rows, row = (cdiv(o + a.padding, a.stride) for o, a in zip(out, axes))
    phases = prod(a.stride for a in axes)
    w_i, w_o, *w_taps = strides5(weight)
    noted.launch(
        gather_phases, cdiv(phases, tile.phases) * cdiv(row, tile.pixels) * input.shape[0] * prod(rows) * c_out * g,
        input, weight, output if bias is None else bias, output,
        input.shape[0], c_out * g, c_in, c_out, *sizes3(input.shape[2:]), *out,
        *axis_scalars(geometry, inverse=False)[:9], *strides5(input), *strides5(output), c_in * w_i, w_i, w_o, *w_taps,
        HAS_BIAS=bias is not None,
        LAST=is_channels_last(output),
        ACC=accumulator(input.dtype),
        EVEN=phases % tile.phases == 0 and all(a.kernel % a.stride == 0 for a in axes),
        UNROLL=tile.unroll,
        BLOCK_M=tile.pixels,
        BLOCK_N=tile.phases,
        num_warps=long.WARPS,
    )  # fmt: skip


def backward_input(noted: Record, chosen: Plan, grad_output, weight, grad_input, geometry: Geometry) -> None:
    """Launch the long-stride kernel of backward_input, and what adds its parts."""
    from ..kernels.long import input_columns

    tile, g, splits = chosen.config, geometry.groups, chosen.splits
    assert isinstance(tile, long.InputColumns)
    c_in, c_out, size = grad_input.shape[1] // g, grad_output.shape[1] // g, sizes3(grad_input.shape[2:])
    rows = grad_input.shape[0] * size[0] * size[1]
    w_i, w_o, *w_taps = strides5(weight)
    to = partial_sums(noted, grad_input, splits)
    noted.launch(
        input_columns, cdiv(size[2], tile.pixels) * rows * splits * cdiv(c_in, tile.channels) * g,
        grad_output, weight, to, c_out, c_in, *sizes3(grad_output.shape[2:]), *size, rows,
        *axis_scalars(geometry, inverse=False), *strides5(grad_output), *strides5(grad_input),
        c_in * w_i, w_o, w_i, *w_taps, splits, grad_input.numel(),
        ACC=accumulator(grad_output.dtype),
        CHANNELS=tile.channels,
        BLOCK_M=tile.pixels,
        BLOCK_H=tile.taps_h,
        BLOCK_W=tile.taps_w,
        num_warps=long.WARPS,
    )  # fmt: skip
    sum_splits(noted, to, grad_input)
