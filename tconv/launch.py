"""Tensors in, tensors out: allocate the result, carry out the plan; a call like an earlier one repeats its record.

The kernels are imported at the first launch, so that tconv imports where Triton is not installed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import gcd, prod

import torch

from . import aten, blocks, columns, configs, few, long, patches, record, shift
from .configs import Config, cdiv, power_of_two
from .dispatch import INTERPRET, allow_tf32, flags, plan, target_of, unsupported
from .geometry import Geometry, sizes3
from .problem import Plan, Problem
from .record import Described, Record, on_device

INT32 = 2**31 - 1
# A launch with these may begin before the one ahead of it has ended, if that lets it; the interpreter knows no such thing.
OVERLAPPING = {} if INTERPRET else {"launch_pdl": True}
FEW_SUMS = 1 << 17  # results of a second stage
PARTS = {"tf32": 1, "tf32x3": 2}  # TF32 values that a packed fp32 weight becomes


def _suggested(t: torch.Tensor) -> torch.memory_format:
    """Tensor::suggest_memory_format of torch's C++, which Python lacks: channels_last where the strides are like it,
    whatever the sizes leave open.  torch's own rendering knows symbolic sizes and imports sympy for them, which would
    be 1 to 3 s of a first call."""
    sizes, strides = t.shape, t.stride()
    if not all(type(n) is int for n in (*sizes, *strides)):
        from torch._prims_common import suggest_memory_format

        return suggest_memory_format(t)
    if t.ndim not in (4, 5) or strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for i in (1, *range(t.ndim - 1, 1, -1), 0):
        if sizes[i] == 0 or strides[i] < least or (i == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[i] * sizes[i]
    return torch.channels_last if t.ndim == 4 else torch.channels_last_3d


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """torch's rule for a convolution's result: channels_last when either operand is laid out so."""
    for t in tensors:
        suggested = _suggested(t)
        if suggested != torch.contiguous_format:
            return suggested
    return torch.contiguous_format


def empty_output(input, weight, size, channels: int):
    """The uninitialised result of the forward pass (also for fake tensors and symbolic sizes)."""
    return torch.empty(
        (input.shape[0], channels, *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input, weight),
    )


def strides5(t: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Memory strides as (first, second, depth, height, width), 0 where a dimension is absent or of size 1."""
    s = [st if n > 1 else 0 for n, st in zip(t.shape, t.stride())]
    return (s[0], s[1], *([0] * (5 - len(s))), *s[2:])  # type: ignore[return-value]


def is_large(t: torch.Tensor, geometry: Geometry | None = None) -> bool:
    """Whether an element offset can pass 2^31: such tensors take kernels with 64-bit offsets.  A layer's kernels also form
    offsets beyond a tensor's borders, as far as its taps and padding reach."""
    beyond = [a.dilation * (a.kernel - 1) + a.stride + 2 * a.padding for a in geometry.axes] if geometry else []
    beyond = [0] * (t.ndim - len(beyond)) + beyond
    reach = sum((n - 1 + more) * s for n, more, s in zip(t.shape, beyond, t.stride()) if n > 1)
    return max(reach, t.numel()) > INT32 - 2**16


def is_channels_last(t: torch.Tensor) -> bool:
    """Whether neighbouring addresses are neighbouring channels rather than neighbouring pixels."""
    return t.shape[1] > 1 and t.stride(1) == 1 and (t.shape[-1] == 1 or t.stride(-1) != 1)


def layout(t: torch.Tensor, groups: int = 1) -> str:
    """The LAYOUT of kernels.common.known_strides that describes an activation of `groups` channel groups."""
    if is_channels_last(t):
        whole = t.shape[1] // groups % 16 == 0 and all(s % 16 == 0 for i, s in enumerate(strides5(t)) if i != 1)
        return "vectors" if whole else "channels"
    return "width" if t.shape[-1] > 1 and t.stride(-1) == 1 else "strided"


def axis_scalars(geometry: Geometry, inverse: bool) -> tuple[int, ...]:
    """kernel, stride, padding and dilation (and gcd and inverse) of the three axes, in the kernels' order."""
    axes = geometry.axes3
    names = ("kernel", "stride", "padding", "dilation") + (("gcd", "inverse") if inverse else ())
    return tuple(getattr(a, name) for name in names for a in axes)


def accumulator(dtype: torch.dtype):
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def of_partials(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial sums of tensors of a dtype are kept: what `accumulator` is on the device."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def vector(t: torch.Tensor, source: str) -> int:
    """The power of two, at most 16, that divides an activation's address and strides in elements (but that of the
    contiguous dimension), and its width where that is the contiguous one."""
    contiguous = 1 if source in ("channels", "vectors") else t.ndim - 1
    strides = [st for i, (st, n) in enumerate(zip(t.stride(), t.shape)) if n > 1 and i != contiguous]
    if 0 in strides:  # expanded: no bulk copy takes that
        return 1
    width = [t.shape[-1]] if source == "width" else []
    together = gcd(16, t.data_ptr() // t.element_size(), *strides, *width)
    return together & -together


def _along_width(t: torch.Tensor) -> int:
    """How many neighbouring pixels, at most 16 bytes of them, one access can have."""
    return gcd(vector(t, "width"), 16 // t.element_size()) if layout(t) == "width" else 1


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
        all(t is None or t.is_contiguous(memory_format=_suggested(t)) for t in (source, destination)),
        (layout(source) == "vectors", destination is not None and layout(destination) == "vectors"),
        "" if weight is None else _lies(weight),
        weight is not None and _aligned(source, weight),
        bias is not None,
    )


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
    chosen = plan(problem, target_of(input.device))
    if chosen.family == "aten":
        return noted.leave(key, partial(aten.forward, geometry=geometry), input, weight, bias)
    with on_device(input):
        if chosen.family == "few":
            source = input
            if chosen.arranged:
                source = noted.workspace(input.shape, input.dtype, input)
                _transpose(noted, input, source, prod(input.shape[2:]), input.shape[1], False)
            gather_few(noted, chosen, source, weight, bias, output, geometry, True)
        elif chosen.family == "columns":
            forward_columns(noted, chosen, input, weight, bias, output, geometry)
        elif chosen.family == "blocks":
            forward_blocks(noted, chosen, input, weight, bias, output)
        elif chosen.family == "shift":
            forward_shift(noted, chosen, input, weight, bias, output, geometry)
        elif chosen.family == "long":
            _forward_long(noted, chosen, input, weight, bias, output, geometry)
        else:
            gather(noted, chosen, input, weight, bias, output, geometry, True, problem.large)
    return noted.keep(key)


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
    chosen = plan(problem, target_of(grad_output.device))
    if chosen.family == "aten":
        of = partial(aten.backward_input, geometry=geometry)
        if chosen.arranged:
            return noted.leave(key, partial(_backward_input_of_copies, of, size), grad_output, weight)
        return noted.leave(key, of, grad_output, weight, grad_input)
    with on_device(grad_output):
        if chosen.family == "few":
            gather_few(noted, chosen, grad_output, weight, None, grad_input, geometry, False)
        elif chosen.family == "long":
            _input_long(noted, chosen, grad_output, weight, grad_input, geometry)
        else:
            gather(noted, chosen, grad_output, weight, None, grad_input, geometry, False, problem.large)
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
    chosen = plan(problem, target_of(input.device))
    if chosen.family == "aten":
        of = partial(aten.backward_weight, geometry=geometry, parts=chosen.splits)
        if chosen.arranged:
            of = partial(_backward_weight_of_copies, of)
        return noted.leave(key, of, grad_output, input, grad_weight)

    with on_device(input):
        if isinstance(chosen.config, columns.WeightColumns):
            _weight_columns(noted, chosen.config, chosen.splits, input, grad_output, grad_weight, geometry)
            return noted.keep(key)
        if chosen.family == "patches":
            _weight_patches(noted, chosen, input, grad_output, grad_weight, geometry)
            return noted.keep(key)
        pairs = c_in * (c_out // g)
        partials = noted.workspace((chosen.splits, geometry.taps, pairs), of_partials(input.dtype), input)
        if chosen.family == "few":
            _weight_few(noted, chosen, input, grad_output, partials, geometry)
        else:
            _weight_sums(noted, chosen, input, grad_output, partials, geometry, problem.large)
        _sum_partials(noted, partials, grad_weight, strides5(grad_weight), c_out // g, geometry.axes3)
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
    with shared_copies():
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
    one, other = (plan(problem, target_of(input.device)) for problem in (of_input, of_weight))
    if not one.family == other.family == "aten" or other.splits > 1 or one.arranged != other.arranged:
        return None
    return partial(_of_one_call, one.arranged, [record.promised(t, f) for t, f in zip(like, formats)])


def _of_one_call(arranged: bool, promised, grad_output, input, weight, geometry: Geometry) -> tuple:
    made = (_of_copies if arranged else aten.gradients)(grad_output, input, weight, geometry)
    return tuple(as_it(t) for as_it, t in zip(promised, made))


def _weight_few(noted: Record, chosen: Plan, input, grad_output, partials, geometry: Geometry) -> None:
    """Launch the few-channel kernel for the partial sums of a weight's gradient."""
    from .kernels.few import weight_few

    tile, depth, g = chosen.config, geometry.axes3[0], geometry.groups
    assert isinstance(tile, few.Few)
    noted.launch(
        weight_few, depth.kernel * (partials.shape[2] // tile.lanes) * chosen.splits,
        input, grad_output, partials,
        input.shape[0], input.shape[1] // g, grad_output.shape[1] // g, g,
        *sizes3(input.shape[2:]), *sizes3(grad_output.shape[2:]),
        depth.kernel, depth.stride, depth.padding, depth.dilation,
        *strides5(input), *strides5(grad_output), chosen.tiles_per_split,
        X_VECTOR=_along_width(input),
        Y_VECTOR=_along_width(grad_output),
        ACC=accumulator(input.dtype),
        t=tile,
        num_warps=few.WARPS,
    )  # fmt: skip


def _weight_sums(noted: Record, chosen: Plan, input, grad_output, partials, geometry: Geometry, large: bool) -> None:
    """Launch the portable kernel for the partial sums of a weight's gradient."""
    from .kernels.direct import weight_direct
    from .kernels.gemm import weight_gemm

    config, g, taps = chosen.config, geometry.groups, geometry.taps
    assert isinstance(config, Config)
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
        LARGE=large,
        ACC=accumulator(input.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BOX_W=config.box_w,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if chosen.family == "direct":
        grid = taps * cdiv(partials.shape[2], config.block_n) * chosen.splits
        noted.launch(weight_direct, grid, input, grad_output, partials, *scalars, **constants)
    else:
        constants |= dict(PRECISION=chosen.precision, BLOCK_K=config.block_k)
        grid = taps * cdiv(c_in, config.block_m) * cdiv(c_out, config.block_n) * g * chosen.splits
        noted.launch(weight_gemm, grid, input, grad_output, partials, *scalars, **constants)


def _weight_columns(
    noted: Record, tile: columns.WeightColumns, splits: int, input, grad_output, grad_weight, geometry: Geometry
) -> None:
    """Launch the column kernel that writes a weight's gradient, and what adds its parts."""
    from .kernels.columns import weight_columns

    g, (batch, c_in), size = geometry.groups, input.shape[:2], sizes3(input.shape[2:])
    c_in, c_out, taps = c_in // g, grad_output.shape[1] // g, geometry.taps
    width = c_out * taps
    to = _partial_sums(noted, grad_weight, splits)
    noted.launch(
        weight_columns, splits * g * cdiv(c_in, tile.channels) * cdiv(width, tile.columns),
        input, grad_output, to, batch * prod(size), c_in, c_out, width, *size, *sizes3(grad_output.shape[2:]),
        *axis_scalars(geometry, inverse=False), *strides5(input), *strides5(grad_output),
        *_column_steps(grad_weight), splits, grad_weight.numel(),
        ALIGNED=width % 16 == 0,
        ACC=accumulator(input.dtype),
        BLOCKS=tile.blocks,
        UNROLL=columns.UNROLL,
        BLOCK_M=tile.channels,
        BLOCK_N=tile.columns,
        num_warps=4,
    )  # fmt: skip
    _sum_splits(noted, to, grad_weight)


def _weight_patches(noted: Record, chosen: Plan, input, grad_output, grad_weight, geometry: Geometry) -> None:
    """Launch the patch kernel, and what adds its parts; 1-d and 2-d layers run as 3-d ones."""
    from .kernels.patches import patch_weight

    tile, splits, kind, axes = chosen.config, chosen.splits, layout(input), geometry.axes3
    assert isinstance(tile, patches.Patches)
    (batch, c_in), c_out, (_, kh, kw) = input.shape[:2], grad_output.shape[1], (a.kernel for a in axes)
    to = _partial_sums(noted, grad_weight, splits)
    noted.launch(
        patch_weight, splits * cdiv(c_in, tile.channels),
        grad_output, input, to, batch, c_in, c_out, *sizes3(input.shape[2:]), *sizes3(grad_output.shape[2:]),
        kh, kw, geometry.taps, *axis_scalars(geometry, inverse=False)[3:], *strides5(input), *strides5(grad_output),
        *_column_steps(grad_weight), chosen.tiles_per_split, grad_weight.numel(),
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
    _sum_splits(noted, to, grad_weight)


def channels_last(t) -> torch.Tensor:
    """A contiguous activation's or weight's copy with its second dimension, whole pieces of 16 bytes, innermost; in fp32 rounded
    to TF32.  Those of 1-d layers have a height of 1 then."""
    key = "channels_last", record.facts(t)
    if known := record.find(key):
        return known.again(t)
    noted = Record(t)
    size = t.shape[2:] if t.ndim > 3 else (1, t.shape[2])
    copy = noted.result((*t.shape[:2], *size), t, torch.channels_last if len(size) == 2 else torch.channels_last_3d)
    _transpose(noted, t, copy, t.shape[1], prod(size), t.dtype is torch.float32)
    return noted.keep(key)


_shared = threading.local()  # .copies: what _of_gradient has made inside shared_copies, by what it was made of


@contextmanager
def shared_copies() -> Iterator[None]:
    """Inside, in this thread, an output's gradient is copied once for both gradients that are made of it."""
    _shared.copies = {}
    try:
        yield
    finally:
        _shared.copies = None


def _of_gradient(t) -> torch.Tensor:
    """channels_last of an output's gradient."""
    copies = getattr(_shared, "copies", None)
    if copies is None:
        return channels_last(t)
    place = t.data_ptr(), record.facts(t)
    if place not in copies:  # t is kept, too, so that no other tensor comes to lie there
        copies[place] = channels_last(t), t
    return copies[place][0]


def contiguous(t) -> torch.Tensor:
    """The contiguous copy of a dense channels_last activation or weight; its pixels, or taps, are whole pieces of 16 bytes."""
    key = "contiguous", record.facts(t)
    if known := record.find(key):
        return known.again(t)
    noted = Record(t)
    copy = noted.result(t.shape, t, torch.contiguous_format)
    _transpose(noted, t, copy, prod(t.shape[2:]), t.shape[1], False)
    return noted.keep(key)


def _transpose(noted: Record, t, copy, rows: int, columns: int, is_tf32: bool) -> None:
    """Write t, for each image [row, column] in memory, as [column, row]: rows are what `arrange` calls channels."""
    from .kernels.copies import arrange

    piece = 16 // t.element_size()
    block_c = power_of_two(rows, 16, 4096 // power_of_two(columns, 16, 64))
    block_p = power_of_two(columns, 16, 4096 // block_c)
    with on_device(t):
        noted.launch(
            arrange, t.shape[0] * cdiv(columns, block_p) * cdiv(rows, block_c),
            t, copy, columns, rows, rows // piece, 1, columns, 1, columns, columns,
            LAST=False, ROUND=is_tf32, VECTOR=gcd(columns, piece), PIECE=piece, BLOCK_P=block_p, BLOCK_C=block_c, PADDED=False,
            OVERLAPS=False,
        )  # fmt: skip


# cuDNN's kernels want channels_last, and of contiguous tensors it makes copies of its own, which take longer; torch's, of a weight
# and its gradient, take longer still.
def _backward_input_of_copies(function, size, grad_output, weight) -> torch.Tensor:
    """What function, of aten.backward_input, makes of channels_last copies; of that size."""
    copy, weight = _of_gradient(grad_output), _of_weight(weight)
    size = size if len(size) > 3 else (*size[:2], 1, size[2])
    like = torch.empty(size, dtype=copy.dtype, device=copy.device, memory_format=_suggested(copy))
    made = function(copy, weight, like)
    del like  # its memory is the contiguous copy's
    return _contiguous_if_whole(made)


def _backward_weight_of_copies(function, grad_output, input, like) -> torch.Tensor:
    """What function, of aten.backward_weight, makes of channels_last copies."""
    return _contiguous_if_whole(function(_of_gradient(grad_output), channels_last(input), like))


def _of_copies(grad_output, input, weight, geometry: Geometry) -> list[torch.Tensor]:
    """What aten.gradients makes of channels_last copies."""
    made = aten.gradients(channels_last(grad_output), channels_last(input), _of_weight(weight), geometry)
    return [_contiguous_if_whole(t) for t in made]


def _of_weight(weight) -> torch.Tensor:
    """channels_last of a weight that it takes."""
    return channels_last(weight) if weight.is_contiguous() and _is_whole(weight, weight.shape[1]) else weight


def _contiguous_if_whole(t) -> torch.Tensor:
    """A dense channels_last tensor as a contiguous one, if `contiguous` takes it."""
    return contiguous(t) if _is_whole(t, prod(t.shape[2:])) and t.movedim(1, -1).is_contiguous() else t


def _is_whole(t, count: int) -> bool:
    """Whether so many elements are whole pieces of 16 bytes, as `arrange` writes them, with its 32-bit offsets."""
    return count % (16 // t.element_size()) == 0 and not is_large(t)


def _arrange(noted: Record, t: torch.Tensor, arranged: torch.Tensor, is_tf32: bool, packing: bool) -> None:
    """Write a dense activation as [image, plane, row, pixel, channel], with zeros up to arranged's size, rounded if it is to be
    TF32: what bulk copies take.  packing: whether it is launched next after a weight's packing, beside which it runs and after
    which it ends."""
    from .kernels.copies import arrange

    channels, size, (batch, *padded, pitch) = t.shape[1], sizes3(t.shape[2:]), arranged.shape
    pixels, piece, last = prod(size), 16 // t.element_size(), is_channels_last(t)
    is_padded = tuple(padded) != size
    block_p = power_of_two(prod(padded), 16, 64)
    block_c = power_of_two(channels, 16, 4096 // block_p)
    grid = batch * cdiv(prod(padded), block_p) * cdiv(pitch, block_c)
    along = channels if last else gcd(size[2], padded[2]) if is_padded else pixels
    noted.launch(
        arrange, grid, t, arranged, pixels, channels, pitch // piece, *size[1:], *padded[1:], prod(padded),
        LAST=last, ROUND=is_tf32, VECTOR=gcd(along, piece), PIECE=piece, BLOCK_P=block_p, BLOCK_C=block_c, PADDED=is_padded,
        OVERLAPS=True,
        **(OVERLAPPING if packing else {}),
    )  # fmt: skip


def backward_bias(grad_output) -> torch.Tensor:
    """grad_bias: grad_output summed over everything but the channels, accumulated in float64."""
    from .kernels.reduce import sum_pixels

    form = _suggested(grad_output)
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
        _sum_partials(noted, partials, grad_bias, (1, 0, 0, 0, 0), 1, None)
    return noted.keep(key)


UNFOLDED = (0,) * 11  # what kernels.pack asks about folded phases


def pack(
    noted: Record, weight, roles, taps, groups, c_src, c_dst, block_n, block_k, parts: int,
    entries: int = 0, phases: int = 1, folded: tuple[int, ...] = UNFOLDED, early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The weight as [group and tap, destination channel, source channel], zero-padded to whole blocks; fp32 as so many
    TF32 values, one whole packed weight after the other (0: as it is).

    roles: the weight's strides along group, source channel and destination channel; taps: along the kernel's axes.
    entries, phases, folded: of folded phases (pack_folded), how many offsets along the width there are in place of taps.
    early: whether the next launch may begin before this one ends.
    """
    from .kernels.pack import pack_weight

    (kd, kh, kw), channels = sizes3(weight.shape[2:]), cdiv(c_dst, block_n // phases) * (block_n // phases)
    blocks, count = groups * kd * kh * (entries or kw), kd * kh * kw
    width, height = cdiv(c_src, block_k) * block_k, channels * phases
    packed = noted.workspace((max(1, parts) * blocks, height, width), weight.dtype, weight)
    order = _order(roles[2], taps, c_dst, weight.shape[2:])
    # A run of addresses is one tap's channels, or all taps of all channels.
    runs, of_a_run = (count, 1) if order == "channels" else (1, count)
    block_r, block_c = power_of_two(channels * of_a_run, 16, 64), power_of_two(width, 16, 64)
    noted.launch(
        pack_weight, runs * cdiv(channels * of_a_run, block_r) * cdiv(width, block_c) * groups,
        weight, packed, c_src, c_dst, count, kh, kw, *roles, *taps, width, channels, blocks * height, *folded,
        PHASES=phases,
        PARTS=parts,
        ORDER=order,
        ALIGNED=all(n % 16 == 0 for n in (roles[0], roles[1], c_dst * of_a_run)),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        EARLY=early,
    )  # fmt: skip
    return packed


def pack_folded(noted: Record, weight, geometry: Geometry, tile: shift.Shift) -> torch.Tensor:
    """The weight as a shift tile with folded phases takes it: [taps and offsets, rows of M, input channel]."""
    (c_in, c_out), (w_i, w_o, *taps), fold = weight.shape[:2], strides5(weight), tile.fold
    axis, entries = geometry.axes3[2], sum(fold.count)
    places = [(first, sum(fold.count[:g]) - low) for g, (first, low) in enumerate(zip(fold.first, fold.low))]
    places += [(axis.stride, 0)] * (shift.MOST_ACCUMULATORS - len(places))  # no phase is that far
    return pack(
        noted, weight, (0, w_i, w_o), taps, 1, c_in, c_out, shift.M, tile.kb, PARTS.get(tile.dtype, 0),
        entries, fold.phases,
        (axis.stride, axis.padding, axis.dilation, entries, *[value for place in places for value in place][1:]), early=True,
    )  # fmt: skip


def order(weight) -> str:
    """How (output channels, taps) of one input channel lie in memory, as kernels.pack says it."""
    _, w_o, *w_taps = strides5(weight)
    return _order(w_o, w_taps, weight.shape[1], weight.shape[2:])


def _column_steps(weight) -> tuple[int, int]:
    """How many of an input channel's (output channel, tap) pairs lie between output channels, and between taps, of a weight
    without gaps."""
    return (1, weight.shape[1]) if order(weight) == "channels" else (prod(weight.shape[2:]), 1)


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


def _order(w_t: int, taps, c_dst: int, kernel) -> str:
    """How (destination channels, taps) of one source channel lie in memory, as kernels.pack says it."""
    k = sizes3(kernel)
    count = prod(k)
    inner = [(k[1] * k[2], k[0]), (k[2], k[1]), (1, k[2])]  # (stride, size) of taps without gaps
    for name, of_channel, of_tap in (("taps", count, 1), ("channels", 1, c_dst)):
        lies = [(of_channel, c_dst), *((stride * of_tap, n) for stride, n in inner)]
        if all(has == wants or n == 1 for has, (wants, n) in zip((w_t, *taps), lies)):
            return name
    return "strided"


def gather_few(
    noted: Record, chosen: Plan, source, weight, bias, destination, geometry: Geometry, is_forward: bool
) -> None:
    """Launch the few-channel kernel, forward or backward_input; 1-d and 2-d layers run as 3-d ones of one row or plane."""
    from .kernels.few import gather_few

    g = geometry.groups
    c_src, c_dst = source.shape[1] // g, destination.shape[1] // g
    w_i, w_o, w_d, w_h, w_w = strides5(weight)
    w_s, w_t = (w_i, w_o) if is_forward else (w_o, w_i)
    w_g = (c_src if is_forward else c_dst) * w_i
    tile, depth = chosen.config, geometry.axes3[0]
    assert isinstance(tile, few.Few)
    size = (source if is_forward else destination).shape[2:]
    target = target_of(source.device)
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
    noted.launch(
        gather_few, programs,
        source, weight, destination if bias is None else bias, destination,
        source.shape[0], c_src, c_dst, g, *sizes3(source.shape[2:]), *sizes3(destination.shape[2:]),
        depth.kernel, depth.stride, depth.padding, depth.dilation, depth.gcd, depth.inverse,
        *strides5(source), *strides5(destination), w_g, w_s, w_d, parts, per_part,
        FORWARD=is_forward,
        SRC_WIDTH=layout(source) == "width",
        DST_WIDTH=layout(destination) == "width",
        SRC_VECTOR=_along_width(source),
        # Where a thread's neighbouring results read a stride apart, threads should do that side by side.
        DST_VECTOR=_along_width(destination) if is_forward or tile.split > 1 else 1,
        HAS_BIAS=bias is not None,
        ACC=accumulator(source.dtype),
        t=tile,
        num_warps=few.WARPS,
        # Sums in blocks have twice the registers; with 168 three programs run on a multiprocessor, with more two (on sm_100 some spill).
        **({"maxnreg": few.REGISTERS} if tile.block and (target.backend, target.arch) == ("cuda", 90) else {}),
    )  # fmt: skip


def _forward_long(noted: Record, chosen: Plan, input, weight, bias, output, geometry: Geometry) -> None:
    """Launch the long-stride kernel of the forward pass; 1-d and 2-d layers run as 3-d ones of one row or plane."""
    from .kernels.long import gather_phases

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


def _input_long(noted: Record, chosen: Plan, grad_output, weight, grad_input, geometry: Geometry) -> None:
    """Launch the long-stride kernel of backward_input, and what adds its parts."""
    from .kernels.long import input_columns

    tile, g, splits = chosen.config, geometry.groups, chosen.splits
    assert isinstance(tile, long.InputColumns)
    c_in, c_out, size = grad_input.shape[1] // g, grad_output.shape[1] // g, sizes3(grad_input.shape[2:])
    rows = grad_input.shape[0] * size[0] * size[1]
    w_i, w_o, *w_taps = strides5(weight)
    to = _partial_sums(noted, grad_input, splits)
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
    _sum_splits(noted, to, grad_input)


def forward_columns(noted: Record, chosen: Plan, input, weight, bias, output, geometry: Geometry) -> None:
    """Launch the column kernels: the products of all pixels with the whole weight, and what of them each output sums."""
    from .kernels.columns import add_columns, column_gemm

    tile, g, batch, taps = chosen.config, geometry.groups, input.shape[0], geometry.taps
    assert isinstance(tile, columns.Columns)
    c_in, c_out = input.shape[1] // g, output.shape[1] // g
    size, out = sizes3(input.shape[2:]), sizes3(output.shape[2:])
    pixels, width = batch * prod(size), c_out * taps
    w_i, last = strides5(weight)[0], order(weight) == "channels"
    planes = gcd(prod(size), 16) if input.is_contiguous() and prod(size) >= tile.pixels else 0
    tiles = batch * cdiv(prod(size), tile.pixels) if planes else cdiv(pixels, tile.pixels)
    of_column = _column_steps(weight)
    partials = noted.workspace((chosen.splits, pixels, g * width), of_partials(input.dtype), input)
    by_pixel = not last and size[2] >= columns.RUN
    noted.launch(
        column_gemm, chosen.splits * g * cdiv(width, tile.columns) * tiles,
        input, weight, partials, pixels, c_in, width, g, *size, *strides5(input), w_i, chosen.splits,
        SRC_LAYOUT=layout(input, g),
        VECTOR=gcd(16, c_in, *(s for i, s in enumerate(strides5(input)) if i != 1)) if is_channels_last(input) else 1,
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


def forward_shift(noted: Record, chosen: Plan, input, weight, bias, output, geometry: Geometry) -> None:
    """Launch the shift kernel; 1-d and 2-d layers run as 3-d ones of one row or one plane.  Groups run one after the other."""
    if (g := geometry.groups) > 1:
        part, one = noted.part, replace(geometry, groups=1)
        for i in range(g):
            of_group = part(input, 1, i, g), part(weight, 0, i, g), part(bias, 0, i, g), part(output, 1, i, g)
            forward_shift(noted, chosen, *of_group, one)
        return
    from .kernels import shift as kernels

    tile = chosen.config
    assert isinstance(tile, shift.Shift)
    (batch, c_in), c_out = input.shape[:2], output.shape[1]
    (d_in, h_in, w_in), (d_out, h_out, w_out) = size, out = sizes3(input.shape[2:]), sizes3(output.shape[2:])
    y_n, y_c, y_d, y_h, y_w = strides5(output)
    w_i, w_o, *w_taps = strides5(weight)
    splits, processors = chosen.splits, target_of(input.device).processors
    walked = shift.walk(tile, geometry.axes3, batch, c_in, c_out, size, out, processors, splits)
    padded = (walked.planes, walked.image, tile.box) if tile.strip else size
    # All workspaces come before the first launch: where torch fills them, its launches must not come between these.
    to = _partial_sums(noted, output, splits)
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
        _arrange(noted, input, source, tile.dtype == "tf32", not tile.raw)
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
    _sum_splits(noted, to, output)


def forward_blocks(noted: Record, chosen: Plan, input, weight, bias, output) -> None:
    """Launch the block kernel; 1-d and 2-d layers run as 3-d ones of one row or one plane."""
    from .kernels import blocks as kernels

    tile = chosen.config
    assert isinstance(tile, blocks.Blocks)
    (batch, c_in), c_out = input.shape[:2], output.shape[1]
    size, (kd, kh, kw) = blocks.joined(tile.stride, input.shape[2:]), tile.stride
    depth, height, width = size
    pixels, taps, row = prod(size), tile.taps, kw * c_out
    walked = blocks.walk(tile, batch, c_out, size, target_of(input.device).processors)
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


def gather(
    noted: Record, chosen: Plan, source, weight, bias, destination, geometry: Geometry, is_forward: bool, large: bool
) -> None:
    """Launch the family's gather kernel: the forward pass, or backward_input with the roles exchanged."""
    from .kernels.direct import gather_direct
    from .kernels.gemm import gather_gemm

    config = chosen.config
    assert isinstance(config, Config)
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
        LARGE=large,
        ACC=accumulator(source.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BOX_W=config.box_w,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
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
    splits, to = chosen.splits, _partial_sums(noted, destination, chosen.splits)
    count = destination.numel() if splits > 1 else 0
    grid = tiles * (packed.shape[1] // config.block_n) * g * splits
    noted.launch(gather_gemm, grid, source, packed, bias, to, *scalars, splits, count, **constants)
    _sum_splits(noted, to, destination)


def _partial_sums(noted: Record, result: torch.Tensor, splits: int) -> torch.Tensor:
    """A workspace for so many whole results, as a gather in parts writes them: dense, in the result's order.  Of one part the
    result itself."""
    if splits == 1:
        return result
    return noted.workspace((splits, result.numel()), of_partials(result.dtype), result)


def _sum_splits(noted: Record, partial: torch.Tensor, result: torch.Tensor) -> None:
    """Launch what adds _partial_sums, where there are several."""
    if partial is result:
        return
    from .kernels.reduce import sum_splits

    splits, count = partial.shape
    rows, block = _sums(count, splits)
    noted.launch(sum_splits, cdiv(count, block), partial, result, count, splits, ROWS=rows, BLOCK=block)


def _sums(count: int, splits: int) -> tuple[int, int]:
    """(splits, results) that a program of kernels.reduce adds side by side: of few results one program would go through
    hundreds of splits one after the other (64 channels of k4, 512 splits: 0.15 ms)."""
    return (1, 1024) if count > FEW_SUMS else (8 if splits <= 8 else 128, 32)


def _sum_partials(noted: Record, partials, grad, strides, c_out, axes) -> None:
    from .kernels.reduce import sum_partials

    splits, taps, columns = partials.shape
    _, kh, kw = (a.kernel for a in axes) if axes else (1, 1, 1)
    rows, block = _sums(taps * columns, splits)
    sizes = splits, taps, columns, c_out, kh, kw
    noted.launch(sum_partials, cdiv(taps * columns, block), partials, grad, *sizes, *strides, ROWS=rows, BLOCK=block)
