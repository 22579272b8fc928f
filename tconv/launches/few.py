"""The few-channel kernels' launches."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from .. import few
from ..configs import Target
from ..geometry import Geometry, sizes3
from ..layouts import along_width, layout, strides5
from ..problem import Plan
from ..record import Record
from .common import accumulator
from .copies import transpose
from .sums import partial_sums, sum_splits
from .weights import pack


def gather(
    noted: Record, chosen: Plan, target: Target, source, weight, bias, destination, geometry: Geometry, is_forward: bool
) -> None:
    """Launch the few-channel kernel, forward or backward_input, where the plan says so of a copy with its pixels innermost; 1-d and
    2-d layers run as 3-d ones of one row or plane."""
    from ..kernels.few import gather_few

    if chosen.arranged:
        copy = noted.workspace(source.shape, source.dtype, source)
        transpose(noted, source, copy, prod(source.shape[2:]), source.shape[1], False)
        source = copy
    g = geometry.groups
    c_src, c_dst = source.shape[1] // g, destination.shape[1] // g
    w_i, w_o, w_d, w_h, w_w = strides5(weight)
    w_s, w_t = (w_i, w_o) if is_forward else (w_o, w_i)
    w_g = (c_src if is_forward else c_dst) * w_i
    tile, depth = chosen.config, geometry.axes3[0]
    assert isinstance(tile, few.Few)
    size = (source if is_forward else destination).shape[2:]
    programs, parts, per_part = few.grid(tile, geometry, source.shape[0], c_dst, size, is_forward, target.processors)
    if (lanes := tile.lanes) > 1:  # as [block of lanes, tap, source channel, lane]
        w_t = w_i if g > 1 else w_t  # a group has one channel
        g, c_dst = 1, c_dst * g
        roles, (kd, kh, kw) = (lanes * w_t, w_t, w_s), sizes3(geometry.kernel)
        weight = pack(noted, weight, roles, (w_d, w_h, w_w), c_dst // lanes, lanes, c_src, 1, 16, 0)
        w_s, tap = lanes, c_src * lanes
        w_g, w_d = kd * kh * kw * tap, kh * kw * tap
        tile = replace(tile, weight=(0, w_d, kw * tap, tap))
    else:
        tile = replace(tile, weight=(w_t, w_d, w_h, w_w))
    splits, to = chosen.splits, partial_sums(noted, destination, chosen.splits)
    noted.launch(
        gather_few, programs * splits,
        source, weight, destination if bias is None else bias, to,
        source.shape[0], c_src, c_dst, g, *sizes3(source.shape[2:]), *sizes3(destination.shape[2:]),
        depth.kernel, depth.stride, depth.padding, depth.dilation, depth.gcd, depth.inverse,
        *strides5(source), *strides5(destination), w_g, w_s, w_d, parts, per_part,
        splits, few.per_part(tile, c_src, splits), destination.numel() if splits > 1 else 0,
        FORWARD=is_forward,
        SRC_WIDTH=layout(source) == "width",
        DST_WIDTH=layout(destination) == "width",
        SRC_VECTOR=along_width(source),
        # Where a thread's neighbouring results read a stride apart, threads should do that side by side.
        DST_VECTOR=along_width(destination) if is_forward or tile.split > 1 else 1,
        HAS_BIAS=bias is not None,
        ACC=accumulator(source.dtype),
        t=tile,
        num_warps=few.WARPS,
        # Sums in blocks have twice the registers; with 168 three programs run on a multiprocessor, with more two (on sm_100 some spill).
        **({"maxnreg": few.REGISTERS} if tile.block and target.is_hopper else {}),
    )  # fmt: skip
    sum_splits(noted, to, destination)


def backward_weight(noted: Record, chosen: Plan, input, grad_output, partials, geometry: Geometry) -> None:
    """Launch the few-channel kernel for the partial sums of a weight's gradient."""
    from ..kernels.few import weight_few

    tile, depth, g = chosen.config, geometry.axes3[0], geometry.groups
    assert isinstance(tile, few.Few)
    noted.launch(
        weight_few, depth.kernel * (partials.shape[2] // tile.lanes) * chosen.splits,
        input, grad_output, partials,
        input.shape[0], input.shape[1] // g, grad_output.shape[1] // g, g,
        *sizes3(input.shape[2:]), *sizes3(grad_output.shape[2:]),
        depth.kernel, depth.stride, depth.padding, depth.dilation,
        *strides5(input), *strides5(grad_output), chosen.tiles_per_split,
        X_VECTOR=along_width(input),
        Y_VECTOR=along_width(grad_output),
        ACC=accumulator(input.dtype),
        t=tile,
        num_warps=few.WARPS,
    )  # fmt: skip
