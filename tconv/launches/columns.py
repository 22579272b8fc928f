"""The column kernels' launches."""

from __future__ import annotations

from math import gcd, prod

from .. import columns
from ..configs import cdiv, power_of_two
from ..geometry import Geometry, sizes3
from ..layouts import channel_vector, column_steps, layout, order, strides5
from ..problem import Plan
from ..record import Record
from .common import accumulator, axis_scalars, of_partials
from .sums import partial_sums, sum_splits


def forward(noted: Record, chosen: Plan, input, weight, bias, output, geometry: Geometry) -> None:
    """Launch the column kernels: the products of all pixels with the whole weight, and what of them each output sums."""
    from ..kernels.columns import add_columns, column_gemm

    tile, g, batch, taps = chosen.config, geometry.groups, input.shape[0], geometry.taps
    assert isinstance(tile, columns.Columns)
    c_in, c_out = input.shape[1] // g, output.shape[1] // g
    size, out = sizes3(input.shape[2:]), sizes3(output.shape[2:])
    pixels, width = batch * prod(size), c_out * taps
    w_i, last = strides5(weight)[0], order(weight) == "channels"
    planes = gcd(prod(size), 16) if input.is_contiguous() and prod(size) >= tile.pixels else 0
    tiles = batch * cdiv(prod(size), tile.pixels) if planes else cdiv(pixels, tile.pixels)
    of_column = column_steps(weight)
    partials = noted.workspace((chosen.splits, pixels, g * width), of_partials(input.dtype), input)
    by_pixel = not last and size[2] >= columns.RUN
    noted.launch(
        column_gemm, chosen.splits * g * cdiv(width, tile.columns) * tiles,
        input, weight, partials, pixels, c_in, width, g, *size, *strides5(input), w_i, chosen.splits,
        SRC_LAYOUT=layout(input, g),
        VECTOR=channel_vector(input, c_in),
        PLANES=planes,
        ALIGNED=w_i % 16 == 0 and width % 16 == 0,
        BY_PIXEL=by_pixel,
        PRECISION=chosen.precision,
        ACC=accumulator(input.dtype),
        BLOCK_M=tile.pixels,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.channels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    most = [min(a.most_taps, cdiv(n, a.dilation // a.gcd)) for a, n in zip(geometry.axes3, size)]
    phases = prod(min(o, a.stride) for o, a in zip(out, geometry.axes3))
    *rows, row = (cdiv(o, a.stride) for o, a in zip(out, geometry.axes3))
    row, rows = (c_out * g, batch * row * prod(rows)) if last else (row, batch * c_out * g * prod(rows))
    long_rows = row >= columns.ROW
    along = power_of_two(row, columns.ROW, tile.outputs) if long_rows else tile.outputs
    programs = cdiv(row, along) * cdiv(rows, tile.outputs // along) if long_rows else cdiv(row * rows, along)
    noted.launch(
        add_columns, phases * programs,
        partials, output if bias is None else bias, output, batch, c_out, g, *size, *out,
        *axis_scalars(geometry, inverse=True), *most, *strides5(output), *of_column,
        CHANNELS=last,
        BY_PIXEL=by_pixel,
        HAS_BIAS=bias is not None,
        SPLITS=chosen.splits,
        ROWS=tile.outputs // along if long_rows else 0,
        BLOCK=along,
    )  # fmt: skip


def backward_weight(noted: Record, chosen: Plan, input, grad_output, grad_weight, geometry: Geometry) -> None:
    """Launch the column kernel that writes a weight's gradient, and what adds its parts."""
    from ..kernels.columns import weight_columns

    tile, splits = chosen.config, chosen.splits
    assert isinstance(tile, columns.WeightColumns)
    g, (batch, c_in), size = geometry.groups, input.shape[:2], sizes3(input.shape[2:])
    c_in, c_out, taps = c_in // g, grad_output.shape[1] // g, geometry.taps
    width = c_out * taps
    to = partial_sums(noted, grad_weight, splits)
    noted.launch(
        weight_columns, splits * g * cdiv(c_in, tile.channels) * cdiv(width, tile.columns),
        input, grad_output, to, batch * prod(size), c_in, c_out, width, *size, *sizes3(grad_output.shape[2:]),
        *axis_scalars(geometry, inverse=False), *strides5(input), *strides5(grad_output),
        *column_steps(grad_weight), splits, grad_weight.numel(),
        ALIGNED=width % 16 == 0,
        ACC=accumulator(input.dtype),
        BLOCKS=tile.blocks,
        UNROLL=columns.UNROLL,
        BLOCK_M=tile.channels,
        BLOCK_N=tile.columns,
        num_warps=4,
    )  # fmt: skip
    sum_splits(noted, to, grad_weight)
