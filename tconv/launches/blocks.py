"""The block kernel's launches."""

from __future__ import annotations

from math import prod

from .. import blocks
from ..configs import Target
from ..layouts import strides5
from ..problem import Plan
from ..record import Described, Record
from .common import OVERLAPPING
from .weights import pack


def forward(noted: Record, chosen: Plan, target: Target, input, weight, bias, output) -> None:
    """Launch the block kernel; 1-d and 2-d layers run as 3-d ones of one row or one plane."""
    from ..kernels import blocks as kernels

    tile = chosen.config
    assert isinstance(tile, blocks.Blocks)
    (batch, c_in), c_out = input.shape[:2], output.shape[1]
    size, (kd, kh, kw) = blocks.joined(tile.stride, input.shape[2:]), tile.stride
    depth, height, width = size
    pixels, taps, row = prod(size), tile.taps, kw * c_out
    walked = blocks.walk(tile, batch, c_out, size, target.processors)
    packed, rows = weight, 0
    if tile.size == 4:
        w_i, w_o, *w_taps = strides5(weight)
        packed = pack(noted, weight, (0, w_i, w_o), w_taps, 1, c_in, c_out, blocks.PACKED_ROWS, tile.kb, 1, early=True)
        blocks_of, rows, columns_in = packed.shape
        w = [blocks_of * rows, columns_in], [columns_in, 1], [tile.of_copy, tile.kb]
    elif tile.layout == "width":
        w = [c_in, taps * c_out], [weight.stride(0), 1], [tile.kb, tile.of_copy]
    else:
        w = [c_in, kd * kh, row], [weight.stride(0), row, 1], [tile.kb, 1, tile.of_copy]
    if tile.layout == "width":
        x = [batch, c_in, pixels], [c_in * pixels, pixels, 1], [1, tile.kb, tile.box]
        lines = depth * kd * height * kh
        strides = [c_out * lines * width * kw, lines * width * kw, width * kw, 1]
        y = [batch, c_out, lines, width * kw], strides, [1, tile.channels, kh, tile.chunk]
    else:
        x = [batch * pixels, c_in], [c_in, 1], [tile.box, tile.kb]
        y = [batch * depth * kd * height * kh, width, row], [width * row, row, 1], [1, tile.unit, tile.chunk]
    facts = zip((input, packed, output), (x, w, y), kernels.descriptor_layouts(tile))
    of_input, of_weight, of_output = (Described(t, (*each, form)) for t, each, form in facts)
    noted.launch(
        kernels.blocks_forward, walked.grid,
        of_input, of_weight, output if bias is None else bias, of_output,
        walked.tiles, tile.slots, walked.boxes, walked.lines, walked.length, height, walked.wrap, depth, walked.across,
        c_out, rows, walked.columns, bias is not None,
        tile,
        num_warps=4,
        **(OVERLAPPING if tile.size == 4 else {}),
    )  # fmt: skip
