"""Tensors in, tensors out: allocate the result, carry out the plan; a call like an earlier one repeats its record."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd, prod

import torch

from . import aten, configs, left, record
from .configs import cdiv
from .dispatch import allow_tf32, decide, flags, target_of, unsupported
from .geometry import Geometry
from .launches import blocks, columns, few, gemm, grid, long, patches, rows, shift
from .launches.common import accumulator, of_partials
from .launches.sums import sum_partials
from .layouts import is_large, layout, memory_format, order, strides5, suggested, vector
from .problem import Problem
from .record import Record, on_device


def make_problem(direction, geometry, input_shape, c_out, source, destination=None, weight=None, bias=None) -> Problem:
    """The Problem of a pass that gathers from `source` and writes `destination`; the forward pass with its weight and bias."""
    kind = layout(source, geometry.groups)
    return Problem(
        direction,
        geometry,
        input_shape[0],
        input_shape[1],
        c_out,
        tuple(input_shape[2:]),
        source.dtype,
        allow_tf32(),
        kind,
        "width" if destination is None else layout(destination, geometry.groups),
        vector(source, kind),
        is_large(source, geometry) or (destination is not None and is_large(destination, geometry)),
        all(t is None or t.is_contiguous(memory_format=suggested(t)) for t in (source, destination)),
        (layout(source) == "vectors", destination is not None and layout(destination) == "vectors"),
        "" if weight is None else _lies(weight),
        weight is not None and _aligned(source, weight),
        bias is not None,
    )


def _lies(weight) -> str:
    """Problem.weight of a weight."""
    lies, c_out = order(weight), weight.shape[1]
    inside = lies == "channels" or (lies == "taps" and prod(weight.shape[2:]) == 1)
    bytes_apart = (weight.element_size() * n for n in (c_out, weight.stride(0)))
    whole = weight.stride(0) > 0 and all(n % 16 == 0 for n in (weight.data_ptr(), *bytes_apart))
    return "pieces" if inside and whole else lies


def _aligned(input, weight) -> bool:
    """Problem.aligned."""
    step = weight.stride(0) * weight.element_size()
    return step > 0 and not any(n % 16 for n in (input.data_ptr(), weight.data_ptr(), step))


def forward(input, weight, bias, geometry: Geometry) -> torch.Tensor:
    """conv_transpose of a batched, checked input."""
    bias = None if bias is None else bias.contiguous()
    key = "forward", geometry, flags(), record.facts(input, weight, bias)
    if known := record.find(key):
        return known.again(input, weight, bias)
    c_out = weight.shape[1] * geometry.groups
    size = input.shape[0], c_out, *geometry.output_size(input.shape[2:])
    noted = Record(input, weight, bias)
    output = noted.result(size, input, memory_format(input, weight))
    if output.numel() == 0:
        return output
    problem = make_problem("forward", geometry, input.shape, c_out, input, output, weight, bias)
    target = target_of(input.device)
    chosen = decide(problem, target, input.device)
    if chosen.family == "aten":
        return noted.leave(key, partial(aten.forward, geometry=geometry), input, weight, bias)
    tensors = input, weight, bias, output
    with on_device(input):
        if chosen.family == "few":
            few.gather(noted, chosen, target, *tensors, geometry, True)
        elif chosen.family == "rows":
            rows.forward(noted, chosen, target, *tensors, geometry)
        elif chosen.family == "columns":
            columns.forward(noted, chosen, *tensors, geometry)
        elif chosen.family == "blocks":
            blocks.forward(noted, chosen, target, *tensors)
        elif chosen.family == "shift":
            shift.forward(noted, chosen, target, *tensors, geometry)
        elif chosen.family == "long":
            long.forward(noted, chosen, *tensors, geometry)
        else:
            gemm.gather(noted, chosen, *tensors, geometry, True, problem.large)
    return noted.keep(key if chosen.lasting else None)


def backward_input(grad_output, weight, input_size, geometry: Geometry) -> torch.Tensor:
    """grad_input, of spatial size `input_size`."""
    key = "backward_input", geometry, flags(), record.facts(grad_output, weight), tuple(input_size)
    if known := record.find(key):
        return known.again(grad_output, weight)
    noted = Record(grad_output, weight)
    size = grad_output.shape[0], weight.shape[0], *input_size
    grad_input = noted.result(size, grad_output, memory_format(grad_output, weight))
    if grad_input.numel() == 0:
        return grad_input
    if grad_output.numel() == 0:
        return grad_input.zero_()
    problem = make_problem("backward_input", geometry, grad_input.shape, grad_output.shape[1], grad_output, grad_input)
    target = target_of(grad_output.device)
    chosen = decide(problem, target, grad_output.device)
    if chosen.family == "aten":
        of = partial(aten.backward_input, geometry=geometry)
        if chosen.arranged:
            return noted.leave(key, partial(left.backward_input, of, size), grad_output, weight)
        return noted.leave(key, of, grad_output, weight, grad_input)
    with on_device(grad_output):
        if chosen.family == "few":
            few.gather(noted, chosen, target, grad_output, weight, None, grad_input, geometry, False)
        elif chosen.family == "long":
            long.backward_input(noted, chosen, grad_output, weight, grad_input, geometry)
        else:
            gemm.gather(noted, chosen, grad_output, weight, None, grad_input, geometry, False, problem.large)
    return noted.keep(key)


def backward_weight(grad_output, input, geometry: Geometry) -> torch.Tensor:
    """grad_weight, of shape (in_channels, out_channels / groups, *kernel)."""
    key = "backward_weight", geometry, flags(), record.facts(grad_output, input)
    if known := record.find(key):
        return known.again(grad_output, input)
    c_in, c_out, g = input.shape[1], grad_output.shape[1], geometry.groups
    noted = Record(grad_output, input)
    grad_weight = noted.result((c_in, c_out // g, *geometry.kernel), input, memory_format(input, grad_output))
    if input.numel() == 0 or grad_output.numel() == 0:
        return grad_weight.zero_()
    problem = make_problem("backward_weight", geometry, input.shape, c_out, input, grad_output)
    chosen = decide(problem, target_of(input.device), input.device)
    if chosen.family == "aten":
        of = partial(aten.backward_weight, geometry=geometry, parts=chosen.splits)
        if chosen.arranged:
            of = partial(left.backward_weight, of)
        return noted.leave(key, of, grad_output, input, grad_weight)

    with on_device(input):
        if chosen.family in ("columns", "long"):
            columns.backward_weight(noted, chosen, input, grad_output, grad_weight, geometry)
            return noted.keep(key)
        if chosen.family == "patches":
            patches.backward_weight(noted, chosen, input, grad_output, grad_weight, geometry)
            return noted.keep(key)
        pairs = c_in * (c_out // g)
        partials = noted.workspace((chosen.splits, geometry.taps, pairs), of_partials(input.dtype), input)
        if chosen.family == "few":
            few.backward_weight(noted, chosen, input, grad_output, partials, geometry)
        elif chosen.family == "grid":
            grid.backward_weight(noted, chosen, input, grad_output, partials, geometry)
        else:
            gemm.backward_weight(noted, chosen, input, grad_output, partials, geometry, problem.large)
        sum_partials(noted, partials, grad_weight, strides5(grad_weight), c_out // g, geometry.axes3)
    return noted.keep(key)


def gradients(grad_output, input, weight, geometry: Geometry, needs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(grad_input, grad_weight) of a training step, None for what `needs` does not ask for."""
    if needs[0] and needs[1]:
        key = "gradients", geometry, flags(), record.facts(grad_output, input, weight)
        way = record.find(key)
        if way is None:
            record.keep(key, way := _together(grad_output, input, weight, geometry) or _apart)
        return way(grad_output, input, weight, geometry)
    grad_input = backward_input(grad_output, weight, input.shape[2:], geometry) if needs[0] else None
    return grad_input, backward_weight(grad_output, input, geometry) if needs[1] else None


def _apart(grad_output, input, weight, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    with left.shared_copies():
        grad_input = backward_input(grad_output, weight, input.shape[2:], geometry)
        return grad_input, backward_weight(grad_output, input, geometry)


def _together(grad_output, input, weight, geometry: Geometry) -> Callable | None:
    """What makes both gradients with one call of aten, where it is left both in one way: such a call takes the host as long as
    several launches.  None elsewhere."""
    if 0 in (input.numel(), grad_output.numel()):
        return None
    formats = memory_format(grad_output, weight), memory_format(input, grad_output)
    like = [
        torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=f) for t, f in zip((input, weight), formats)
    ]
    where = geometry, input.shape, grad_output.shape[1]
    of_input = make_problem("backward_input", *where, grad_output, like[0])
    of_weight = make_problem("backward_weight", *where, input, grad_output)
    one, other = (decide(problem, target_of(input.device), input.device) for problem in (of_input, of_weight))
    if not one.family == other.family == "aten" or other.splits > 1 or one.arranged != other.arranged:
        return None
    make = left.Gradients() if one.arranged else aten.gradients
    return partial(_of_one_call, make, [record.promised(t, f) for t, f in zip(like, formats)])


def _of_one_call(make: Callable, promised, grad_output, input, weight, geometry: Geometry) -> tuple:
    made = make(grad_output, input, weight, geometry)
    return tuple(as_it(t) for as_it, t in zip(promised, made))


def backward_bias(grad_output) -> torch.Tensor:
    """grad_bias: grad_output summed over everything but the channels, accumulated in float64."""
    from .kernels.reduce import sum_pixels

    form = suggested(grad_output)
    grad_output = grad_output.contiguous(memory_format=form)  # expanded ones, say
    key = "backward_bias", record.facts(grad_output)
    if known := record.find(key):
        return known.again(grad_output)
    target = target_of(grad_output.device)
    if unsupported(target):
        return aten.backward_bias(grad_output)
    noted = Record(grad_output)
    (batch, channels), last = grad_output.shape[:2], form != torch.contiguous_format
    grad_bias = noted.result((channels,), grad_output, torch.contiguous_format)
    if grad_output.numel() == 0:
        return grad_bias.zero_()
    images, pixels = (1, batch * prod(grad_output.shape[2:])) if last else (batch, prod(grad_output.shape[2:]))
    sums = configs.pixel_sums(images, channels, pixels, last, target)
    with on_device(grad_output):
        partials = noted.workspace((sums.splits, 1, channels), torch.float64, grad_output)
        noted.launch(
            sum_pixels, cdiv(channels, sums.block_n) * sums.splits,
            grad_output, partials, images, channels, pixels, sums.tiles_per_split,
            LAST=last,
            VECTOR=gcd(channels if last else pixels, 16),
            ACC=accumulator(grad_output.dtype),
            UNROLL=sums.unroll,
            BLOCK_M=sums.block_m,
            BLOCK_N=sums.block_n,
            num_warps=4,
        )  # fmt: skip
        sum_partials(noted, partials, grad_bias, (1, 0, 0, 0, 0), 1, None)
    return noted.keep(key)
