"""A weight's gradient on a grid: the launches that lay activations out, and the product."""

from __future__ import annotations

from math import prod

from .. import grid
from ..configs import PARTS, cdiv
from ..geometry import Geometry, sizes3
from ..layouts import layout, strides5
from ..problem import Plan
from ..record import Described, Record


def backward_weight(noted: Record, chosen: Plan, input, grad_output, partials, geometry: Geometry) -> None:
    """Launch the copies onto the grid, and the kernel for the partial sums of a weight's gradient."""
    from ..kernels.grid import weight_grid

    tile, axes = chosen.config, geometry.axes3
    assert isinstance(tile, grid.Grid)
    (batch, c_in), c_out, parts = input.shape[:2], grad_output.shape[1], PARTS[chosen.precision]
    spots = grid.spots(geometry, batch, input.shape[2:])
    places, images = spots.places(batch), spots.parts * batch
    strides, leads = tuple(a.stride for a in axes), tuple(map(grid.lead, axes))
    fronts = tuple(a.padding + n for a, n in zip(axes, leads))
    x = _laid(noted, input, spots, spots.rows, (1, 1, 1), (0, 0, 0), parts)
    y = _laid(noted, grad_output, spots, spots.reached, strides, fronts, parts)
    described = (
        Described(t, ([len(t), n], [n, 1], [rows, grid.PLACES]))
        for t, n, rows in zip((x, y), places, (tile.inputs, tile.outputs))
    )
    noted.launch(
        weight_grid, tile.programs(c_in, c_out, geometry.taps) * chosen.splits,
        *described, partials, c_in, c_out, *(a.kernel for a in axes), *strides, *(a.dilation for a in axes), *leads,
        *spots.reached[1:], images, cdiv(places[0], grid.PLACES), chosen.tiles_per_split,
        PARTS=parts,
        TAPS=tile.taps,
        BLOCK_M=tile.inputs,
        BLOCK_N=tile.outputs,
        BLOCK_K=grid.PLACES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip


def _laid(noted: Record, t, spots: grid.Spots, size, strides, fronts, parts: int):
    """An activation on a grid of `size` places, as [TF32 part, phase, channel: place]."""
    from ..kernels.grid import lay_on_grid

    channels, images = t.shape[1], t.shape[0] * spots.parts
    laid = noted.workspace((parts * prod(strides) * channels, prod(size) * images), t.dtype, t)
    kind, width = layout(t), size[2] * strides[2]
    tile = grid.copied(channels, images, width, kind in ("channels", "vectors"))
    rows = prod(size[:2]) * prod(strides[:2])
    noted.launch(
        lay_on_grid,
        rows * cdiv(channels, tile.channels) * cdiv(images, tile.images) * cdiv(width, tile.width),
        t, laid, channels, images, *sizes3(t.shape[2:]), *size, *spots.step, *strides, *fronts, *strides5(t),
        SRC_LAYOUT=kind,
        PARTS=parts,
        LOG=spots.parts.bit_length() - 1,
        BLOCK_C=tile.channels,
        BLOCK_I=tile.images,
        BLOCK_W=tile.width,
        num_warps=4,
    )  # fmt: skip
    return laid
