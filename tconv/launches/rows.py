"""The row kernel's launch."""

from __future__ import annotations

from .. import rows
from ..configs import Target, cdiv
from ..geometry import Geometry, sizes3
from ..layouts import channel_vector, layout, strides5
from ..problem import Plan
from ..record import Record
from .common import accumulator, of_partials
from .weights import pack


def forward(noted: Record, chosen: Plan, target: Target, input, weight, bias, output, geometry: Geometry) -> None:
    from ..kernels.rows import column_rows

    tile, (_, tall, wide) = chosen.config, geometry.axes3
    assert isinstance(tile, rows.Rows)
    (batch, c_in), c_out, size = input.shape[:2], output.shape[1], sizes3(input.shape[2:])
    (first_h, rows_q), (first_w, width_q) = (rows.reached(geometry, size, axis) for axis in (1, 2))
    inner = rows.inner(wide, tile.width, tile.piece)
    across = cdiv(width_q, inner)
    count = batch * across * tile.chunks
    programs = min(count, tile.shape.resident * target.processors)
    s_n, s_c, _, s_h, s_w = strides5(input)
    d_n, d_c, _, d_h, d_w = strides5(output)
    w_i, w_o, *taps = strides5(weight)
    packed = pack(
        noted, weight, (0, w_i, w_o), taps, 1, c_in, c_out, c_out, tile.channels, 1 if chosen.precision == "tf32" else 0
    )  # fmt: skip
    ring = noted.workspace((programs, c_out * geometry.taps, tile.ring * tile.width), of_partials(input.dtype), input)
    noted.launch(
        column_rows, programs,
        input, packed, output if bias is None else bias, output, ring, count, across, tile.chunks, tile.chunk_rows,
        first_h, first_w, rows_q, inner, rows.before(wide, tile.piece), rows.warm(tall, tile.rows),
        c_in, *size[1:], *sizes3(output.shape[2:])[1:], tall.padding, wide.padding,
        s_n, s_c, s_h, s_w, d_n, d_c, d_h, d_w,
        C_DST=c_out,
        KH=tall.kernel,
        KW=wide.kernel,
        STRIDE_H=tall.stride,
        STRIDE_W=wide.stride,
        DIL_H=tall.dilation,
        DIL_W=wide.dilation,
        SRC_LAYOUT=layout(input),
        VECTOR=channel_vector(input, c_in),
        PIECE=tile.piece,
        HAS_BIAS=bias is not None,
        PRECISION=chosen.precision,
        ACC=accumulator(input.dtype),
        ROWS=tile.rows,
        WIDTH=tile.width,
        RING=tile.ring,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.channels,
        num_warps=rows.WARPS,
        num_stages=tile.shape.num_stages,
        **({"maxnreg": tile.shape.registers} if tile.shape.registers and target.is_hopper else {}),
    )  # fmt: skip
