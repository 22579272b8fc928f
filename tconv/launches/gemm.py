"""The portable kernels' launches: the tensor core's and the direct ones."""

from __future__ import annotations

from math import prod

import torch

from ..configs import Config, cdiv
from ..geometry import Geometry, sizes3
from ..layouts import layout, strides5
from ..problem import Plan
from ..record import Record
from .common import accumulator, axis_scalars
from .copies import last_form, transpose
from .sums import partial_sums, sum_splits
from .weights import pack


def _of_tile(config: Config, large: bool, source) -> dict:
    """The constants and options that every one of these kernels has of its tile."""
    return dict(
        LARGE=large,
        ACC=accumulator(source.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BOX_W=config.box_w,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _channels_last(noted: Record, t: torch.Tensor) -> torch.Tensor:
    """A contiguous activation's copy with its channels, whole pieces of 16 bytes, innermost."""
    size, form = last_form(t)
    copy = noted.workspace(size, t.dtype, t, form)
    transpose(noted, t, copy, t.shape[1], prod(size[2:]), False)
    return copy


def gather(
    noted: Record, chosen: Plan, source, weight, bias, destination, geometry: Geometry, is_forward: bool, large: bool
) -> None:
    """Launch the family's gather kernel: the forward pass, or backward_input with the roles exchanged; where the plan says so of a
    copy with its channels innermost."""
    from ..kernels.direct import gather_direct
    from ..kernels.gemm import gather_gemm

    config = chosen.config
    assert isinstance(config, Config)
    source = _channels_last(noted, source) if chosen.arranged else source
    g = geometry.groups
    c_src, c_dst = source.shape[1] // g, destination.shape[1] // g
    size = sizes3(destination.shape[2:])
    phases = prod(min(o, a.stride) for o, a in zip(size, geometry.axes3)) if is_forward else 1
    quotient = [cdiv(o, a.stride if is_forward else 1) for o, a in zip(size, geometry.axes3)]
    rows = source.shape[0] * quotient[0] * quotient[1]
    tiles = cdiv(rows, config.block_m // config.box_w) * cdiv(quotient[2], config.box_w) * phases
    # The weight's strides along group, source channel, destination channel and taps.
    w_i, w_o, *w_taps = strides5(weight)
    w_roles = (c_src * w_i, w_i, w_o) if is_forward else (c_dst * w_i, w_o, w_i)
    scalars = (
        source.shape[0],
        c_src,
        c_dst,
        *sizes3(source.shape[2:]),
        *size,
        *axis_scalars(geometry, inverse=True),
        *strides5(source),
        *strides5(destination),
    )
    constants = dict(
        FORWARD=is_forward,
        SRC_LAYOUT=layout(source, g),
        DST_LAYOUT=layout(destination, g),
        HAS_BIAS=bias is not None,
        **_of_tile(config, large, source),
    )
    bias = source if bias is None else bias
    if chosen.family == "direct":
        grid = tiles * cdiv(c_dst * g, config.block_n)
        noted.launch(
            gather_direct, grid, source, weight, bias, destination, *scalars, g, *w_roles, *w_taps, **constants
        )
        return
    packed = pack(
        noted, weight, w_roles, w_taps, g, c_src, c_dst, config.block_n, config.block_k, int(chosen.precision == "tf32")
    )
    constants |= dict(EVEN_C=c_src % config.block_k == 0, PRECISION=chosen.precision, BLOCK_K=config.block_k)
    splits, to = chosen.splits, partial_sums(noted, destination, chosen.splits)
    count = destination.numel() if splits > 1 else 0
    grid = tiles * (packed.shape[1] // config.block_n) * g * splits
    noted.launch(gather_gemm, grid, source, packed, bias, to, *scalars, splits, count, **constants)
    sum_splits(noted, to, destination)


def backward_weight(noted: Record, chosen: Plan, input, grad_output, partials, geometry: Geometry, large: bool) -> None:
    """Launch the portable kernel for the partial sums of a weight's gradient, where the plan says so of copies with their channels
    innermost."""
    from ..kernels.direct import weight_direct
    from ..kernels.gemm import weight_gemm

    config, g, taps = chosen.config, geometry.groups, geometry.taps
    assert isinstance(config, Config)
    if chosen.arranged:
        input, grad_output = _channels_last(noted, input), _channels_last(noted, grad_output)
    c_in, c_out = input.shape[1] // g, grad_output.shape[1] // g
    scalars = (
        input.shape[0],
        c_in,
        c_out,
        g,
        *sizes3(input.shape[2:]),
        *sizes3(grad_output.shape[2:]),
        *axis_scalars(geometry, inverse=False),
        *strides5(input),
        *strides5(grad_output),
        chosen.tiles_per_split,
    )
    constants = dict(
        X_LAYOUT=layout(input, g),
        Y_LAYOUT=layout(grad_output, g),
        **_of_tile(config, large, input),
    )
    if chosen.family == "direct":
        grid = taps * cdiv(partials.shape[2], config.block_n) * chosen.splits
        noted.launch(weight_direct, grid, input, grad_output, partials, *scalars, **constants)
    else:
        constants |= dict(PRECISION=chosen.precision, BLOCK_K=config.block_k)
        grid = taps * cdiv(c_in, config.block_m) * cdiv(c_out, config.block_n) * g * chosen.splits
        noted.launch(weight_gemm, grid, input, grad_output, partials, *scalars, **constants)
