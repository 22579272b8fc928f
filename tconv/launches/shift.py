"""The shift kernel's launches."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from .. import shift
from ..configs import PARTS, Target, cdiv
from ..geometry import Geometry, sizes3
from ..layouts import strides5
from ..problem import Plan
from ..record import Described, Record
from .common import OVERLAPPING
from .copies import arrange
from .sums import partial_sums, sum_splits
from .weights import pack, pack_folded


def forward(noted: Record, chosen: Plan, target: Target, input, weight, bias, output, geometry: Geometry) -> None:
    """Launch the shift kernel; 1-d and 2-d layers run as 3-d ones of one row or one plane.  Groups run one after the other."""
    if (g := geometry.groups) > 1:
        part, one = noted.part, replace(geometry, groups=1)
        for i in range(g):
            of_group = part(input, 1, i, g), part(weight, 0, i, g), part(bias, 0, i, g), part(output, 1, i, g)
            forward(noted, chosen, target, *of_group, one)
        return
    from ..kernels import shift as kernels

    tile = chosen.config
    assert isinstance(tile, shift.Shift)
    (batch, c_in), c_out = input.shape[:2], output.shape[1]
    (d_in, h_in, w_in), (d_out, h_out, w_out) = size, out = sizes3(input.shape[2:]), sizes3(output.shape[2:])
    y_n, y_c, y_d, y_h, y_w = strides5(output)
    w_i, w_o, *w_taps = strides5(weight)
    splits = chosen.splits
    walked = shift.walk(tile, geometry.axes3, batch, c_in, c_out, size, out, target.processors, splits)
    padded = (walked.planes, walked.image, tile.box) if tile.strip else size
    # All workspaces come before the first launch: where torch fills them, its launches must not come between these.
    to = partial_sums(noted, output, splits)
    source = input
    if chosen.arranged:
        piece = 16 // input.element_size()
        source = noted.workspace((batch, *padded, cdiv(c_in, piece) * piece), input.dtype, input)
    if tile.raw:
        packed = weight
    elif tile.fold.phases > 1:
        packed = pack_folded(noted, weight, geometry, tile)
    else:
        rows, parts = tile.fold.of_tile, PARTS.get(tile.dtype, 0)
        packed = pack(noted, weight, (0, w_i, w_o), w_taps, 1, c_in, c_out, rows, tile.kb, parts, early=True)
    # The first launch waits for all before the call, as usual.
    if chosen.arranged:
        arrange(noted, input, source, tile.dtype == "tf32", not tile.raw)
    x_n, x_c, x_d, x_h, x_w = strides5(source.movedim(-1, 1) if chosen.arranged else source)
    w_layout, x_layout = kernels.descriptor_layouts(tile)
    if tile.raw:
        facts = [c_in, geometry.taps, c_out], [w_i, c_out, 1], [tile.kb, 1, shift.M], w_layout
    else:
        blocks, height, width = packed.shape
        facts = [blocks * height, width], [width, 1], [shift.M, tile.kb], w_layout
    x: torch.Tensor | Described = source
    if tile.how != "threads":
        # A dimension of size 1 has no stride of its own; the descriptor wants a multiple of 16 bytes.
        shape, strides = [batch, d_in, h_in, w_in, c_in], [x_n or 16, x_d or 16, x_h or 16, x_w or 16, x_c or 16]
        box = [1, 1, 1, tile.box if tile.how == "bulk" else tile.bring, tile.kb]
        order = [0, 1, 2, 3, 4] if tile.src_layout == "channels" else [0, 4, 1, 2, 3]
        if not tile.volume:
            order.remove(1)
        shape, strides, box = ([each[i] for i in order] for each in (shape, strides, box))
        if tile.strip:  # all pixels one after the other
            pitch = source.shape[-1] if chosen.arranged else c_in
            shape, strides, box = [batch * prod(padded), c_in], [pitch, 1], [tile.of_copy, tile.kb]
        strides[-1] = 1
        # Of fp32 that no thread has rounded, the copies do: as Triton 3.7 and later can ask for.
        rounding = ("zero", True) if tile.rounds and not chosen.arranged else ()
        x = Described(source, (shape, strides, box, x_layout, *rounding))
    noted.launch(
        kernels.shift, (walked.grid, splits),
        x, Described(packed, facts),
        output if bias is None else bias, to,
        walked.tiles_co, walked.tiles_w, walked.image, walked.blocks, walked.tiles,
        batch, c_in, h_in, w_in, x_n, x_c, x_h, x_w,
        c_out, h_out, w_out, y_n, y_c, y_h, y_w, bias is not None,
        walked.planes, d_in, x_d, d_out, y_d, walked.of_part, output.numel(), chosen.arranged, walked.of_round, walked.spin,
        tile,
        num_warps=4 * tile.groups,
        **(OVERLAPPING if chosen.arranged or not tile.raw else {}),
    )  # fmt: skip
    sum_splits(noted, to, output)
