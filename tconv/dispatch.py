"""Which kernel family runs a pass, with which configuration, and why: the one place that decides.

`refuse` looks at what a tensor is (device, dtype, layout) and sends what tconv does not accelerate to
aten before any operator of tconv is called.  `plan` looks at one pass of one problem on one device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import columns, configs, few, long, shift
from .configs import Config, Target, cdiv
from .geometry import Geometry

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

PASSES = ("forward", "backward_input", "backward_weight")
HALF = (torch.float16, torch.bfloat16)
# float64 runs on the kernels in the interpreter alone, where gradcheck wants it.
DTYPES = (torch.float16, torch.bfloat16, torch.float32) + ((torch.float64,) if INTERPRET else ())

# Groups of at most this many source channels and destination channels take the direct kernels: a
# tensor-core tile has 16 of each at least, so that less than a sixteenth of it would be useful.
DIRECT_CHANNELS = 4
# TF32 wants this many channels a group on both sides; cuDNN computes narrower groups in IEEE fp32, and
# there tf32x3 costs nothing, since such layers are bound by memory (L1/72 and L1/75 of KernelBench).
TF32_GROUP_CHANNELS = 32
# Sums of fewer products take IEEE multiply-adds instead of tf32x3: three TF32 products have an error of their own
# (1.5e-7 in root mean square) below which a short fp32 chain stays (4e-8 at 8 products).  At 48 products (L1/75) the
# chain's largest error was the larger one, at 36 it was not.  Where TF32 is allowed, cuDNN computes such sums in fp32
# too, unless both sides have many channels (L1/81: 32 products, 32 to 64 channels, TF32).
IEEE_PRODUCTS = 40
# Longer sums take tf32x3 where TF32 is allowed: the tensor core truncates as it accumulates, and after 86,000 products
# (FCN-32s, k64) that bias had grown to the size of TF32's own rounding.  tf32x3 adds in fp32 once a tile of K;
# backward_weight splits its sums (configs.splits).
TF32_PRODUCTS = 1 << 15


# The one AMD GPU whose tensor cores Triton gives TF32.
TF32_HIP = 942


@dataclass(frozen=True)
class Problem:
    """One pass of one layer at one size: what `plan` decides from."""

    direction: str  # one of PASSES
    geometry: Geometry
    batch: int
    c_in: int
    c_out: int
    input_size: tuple[int, ...]
    dtype: torch.dtype
    tf32: bool  # torch's flag for fp32 convolutions, as read at the call
    source: str  # the LAYOUT (kernels.common.known_strides) of the tensor that the pass gathers from
    destination: str = "width"  # that of the result
    vector: int = 1  # so many elements, at most 16, divide the source's address and all its strides but 1
    large: bool = False  # whether element offsets need 64 bits
    dense: bool = True  # whether both tensors fill their memory, contiguous or channels_last
    # Whether source and destination are channels_last, their channels and strides whole vectors of 16 elements.
    whole: tuple[bool, bool] = (False, False)
    weight: str = "taps"  # forward: how the weight lies (launch.order)

    @property
    def channels_last(self) -> bool:
        return self.source in ("channels", "vectors")


@dataclass(frozen=True)
class Plan:
    """A decision: the kernel family ("few", "columns", "long", "shift", "gemm", "direct" or "aten"), its configuration and
    the reason."""

    family: str
    reason: str
    precision: str = ""
    config: (
        Config
        | few.Few
        | columns.Columns
        | columns.Scatter
        | columns.WeightColumns
        | long.Phases
        | long.InputColumns
        | shift.Shift
        | None
    ) = None
    splits: int = 1
    tiles_per_split: int = 0
    # Whether what the pass reads is first copied, its channels innermost, at TF32 rounded: for the shift kernel its input, of
    # strips with zeros behind rows; for aten's gradients the activations.
    arranged: bool = False


def refuse(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why these tensors (after autocast) are left to aten, or None when tconv takes them."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return "an argument is not a tensor"
    for t in tensors:
        if type(t) not in _PLAIN and not _is_plain(t):
            return f"{type(t).__name__} is a tensor subclass with rules of its own"
    device = input.device.type
    if device == "cpu" and not INTERPRET:
        return "CPU tensors run aten"
    if device not in ("cpu", "cuda", "meta"):
        return f"no kernels for device type {device}"
    if any(t.layout != torch.strided for t in tensors):
        return "sparse and mkldnn layouts run aten"
    if any(t.is_quantized for t in tensors):
        return "quantized tensors run aten"
    if input.dtype not in DTYPES:
        return f"{str(input.dtype).removeprefix('torch.')} runs aten"
    if torch.onnx.is_in_onnx_export():
        return "ONNX has an operator for aten's transposed convolution, and none for tconv's"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation runs aten"
    return None


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor subclass (a fake tensor, say) behaves as a tensor; DTensor and the like do not."""
    own = type(t).__torch_function__
    default = getattr(own, "__func__", own) is torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return (default or own is torch._C._disabled_torch_function_impl) and not is_traceable_wrapper_subclass(t)


_without: tuple[str, ...] = ()  # what `without` says


@contextmanager
def without(*families: str) -> Iterator[None]:
    """Inside, in every thread, `plan` does without some families, to measure or test the others.  An inner one replaces
    what an outer one says; threads should not have different ones at a time.

    families: of "few", "columns", "long", "shift" and "aten".  What no kernel of tconv can do is left to aten all the same.
    """
    global _without
    if unknown := [name for name in families if name not in ("few", "columns", "long", "shift", "aten")]:
        raise ValueError(f"families: expected few, columns, long, shift or aten, got {unknown[0]!r}")
    before, _without = _without, families
    try:
        yield
    finally:
        _without = before


def flags() -> tuple:
    """What besides tensors and layer a plan depends on, as it stands now."""
    return allow_tf32(), _left_out()


def _left_out() -> tuple[str, ...]:
    """The families that are not to be chosen: aten is no choice where its cuDNN is switched off."""
    return _without if torch.backends.cudnn.enabled or "aten" in _without else (*_without, "aten")


def target_of(device: torch.device) -> Target:
    """The Target of a tensor's device; of each device it is worked out once."""
    return _target(device, _left_out())


@cache
def _target(device: torch.device, without: tuple[str, ...]) -> Target:
    if device.type == "cpu":
        return Target("interpreter", 0, 4, without=without)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = re.match(r"gfx(\d+)", properties.gcnArchName)
        return Target("hip", int(name[1]) if name else 0, properties.multi_processor_count, without=without)
    import triton

    major, minor = map(int, triton.__version__.split(".")[:2])
    arch = 10 * properties.major + properties.minor
    return Target("cuda", arch, properties.multi_processor_count, (major, minor), without)


_conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # to look it up takes 4 us, which every call would pay


def allow_tf32() -> bool:
    """Torch's flag for fp32 convolutions as it stands now: torch.backends.cudnn.conv.fp32_precision,
    which torch.backends.cudnn.allow_tf32 and the more general fp32_precision settings also set."""
    return _conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def precision(problem: Problem, target: Target) -> str:
    """The PRECISION of kernels.common.matmul at which a problem's products are formed."""
    if problem.dtype in HALF:
        return "widen" if target.backend == "interpreter" and problem.dtype is torch.bfloat16 else "half"
    if problem.dtype is torch.float64:
        return "ieee"
    products, g = _products(problem), problem.geometry.groups
    short = products < IEEE_PRODUCTS
    wide = min(problem.c_in, problem.c_out) // g >= TF32_GROUP_CHANNELS
    if problem.direction == "backward_weight":
        allowed = not short and (wide or g == 1)
    else:
        allowed = products <= TF32_PRODUCTS and (wide or (g == 1 and not short))
    if problem.tf32 and allowed and (target.backend != "hip" or target.arch == TF32_HIP):
        return "tf32"
    return "ieee" if short or target.backend == "hip" else "tf32x3"


def _taps(geometry: Geometry) -> int:
    """How many taps a phase of the forward pass has, at most."""
    return prod(a.most_taps for a in geometry.axes)


def _products(problem: Problem) -> int:
    """How many products one element of the pass's result sums, at most."""
    geometry = problem.geometry
    if problem.direction == "forward":
        return problem.c_in // geometry.groups * _taps(geometry)
    if problem.direction == "backward_input":
        return problem.c_out // geometry.groups * geometry.taps
    return problem.batch * prod(problem.input_size)


def unsupported(target: Target) -> str | None:
    if target.backend == "cuda" and target.arch < 80:
        return f"compute capability {target.arch / 10} is below 8.0"
    return None


# What is left to aten, and why: the time of the kernels that every GPU runs over cuDNN's.  Gradients: on an H100 and an H200,
# geometric means over core; in IEEE fp32 they are level, but for depthwise grad_input; so are depthwise weights'.  Forward:
# groups that the shift kernel does not take: StyleGAN2's 8 of 512 to 256 channels (16 bits 1.7 to 2.1, TF32 1.7 and 2.1),
# and in 16 bits, channels_last, L1/72 and L1/75 (8 to 16 channels, 2.2 and 1.5; 0.3 to 0.6 in NCHW, and in TF32); and products
# of contiguous matrices: k1 of PointPillars, SECOND, CenterPoint and BEVFusion (64 to 128 and 128 to 256 channels, 16 bits 1.2
# to 1.6, TF32 0.97 to 1.36; 0.4 in IEEE fp32).
LEFT = {
    "groups": "cuDNN measured 1.5 to 2.2 times faster with such groups on an H200",
    "product": "cuDNN measured up to 1.6 times faster with a kernel of 1 on contiguous tensors on an H200",
    "backward_input": "cuDNN's gradient measured 2.5 times faster on Hopper GPUs",
    "backward_weight": "cuDNN's gradient measured 3.4 times faster on Hopper GPUs",
}
# cuDNN's deterministic TF32 weight gradients may add all their products in one chain, in which the tensor core truncates: with
# 262,144 of them (L2/77) the error was 6.8e-4 in root mean square, with 524,288 (L2/78) 1.2e-3, where rounded operands and an
# exact sum have 3e-4.  So they get parts of the batch of about so many products, and the parts are added in fp32; what has a
# batch of few large images keeps long chains.  Not in 16 bits: each part would be rounded, which costs what the chain costs.
LEFT_PRODUCTS, MOST_LEFT_PARTS = 1 << 16, 16


def _leave(problem: Problem, is_direct: bool, how: str, target: Target) -> Plan | None:
    """The plan to leave a pass to aten where that is faster."""
    p = problem
    if target.backend != "cuda" or "aten" in target.without or p.large:
        return None
    half = p.dtype in HALF
    if p.direction == "forward":
        g = p.geometry.groups
        wide = min(p.c_in, p.c_out) // g >= shift.WIDE and (half or how == "tf32")
        left = g > 1 and not is_direct and (wide or (half and p.channels_last and p.geometry.ndim > 1))
        return Plan("aten", LEFT["groups"]) if left else None
    vectors = p.c_in % (16 // p.dtype.itemsize) == p.c_out % (16 // p.dtype.itemsize) == 0
    arranged = p.source == p.destination == "width" and p.dense and vectors and not is_direct
    if p.direction == "backward_input":
        # With TF32 allowed cuDNN decides where to use it, as it does for torch; but its choice for torch is fp32 for long sums.
        if not (half or is_direct or (p.tf32 and _products(p) <= TF32_PRODUCTS)):
            return None
        # At TF32 a copy pays where the gradient of the weight shares it, and costs little by itself where there are strides.
        arranged = arranged and (half or (how == "tf32" and max(p.geometry.stride) > 1))
        arranged = arranged and prod(p.input_size) % (16 // p.dtype.itemsize) == 0
        return Plan("aten", LEFT[p.direction], arranged=arranged)
    # cuDNN's deterministic algorithms truncate some layers' operands to TF32: they get rounded ones, and no layer
    # that is to have better than TF32.
    if is_direct or not (half or (how == "tf32" and p.dense)):
        return None
    parts = 1 if half else _batch_parts(p)
    return Plan("aten", LEFT[p.direction], "" if half else "tf32", splits=parts, arranged=arranged)


def _batch_parts(problem: Problem) -> int:
    """In how many parts of the batch aten sums a weight's gradient at TF32."""
    least = min(problem.batch, MOST_LEFT_PARTS, cdiv(problem.batch * prod(problem.input_size), LEFT_PRODUCTS))
    return next((n for n in range(least, min(problem.batch, MOST_LEFT_PARTS) + 1) if problem.batch % n == 0), least)


def _leave_product(problem: Problem, how: str, target: Target) -> Plan | None:
    """The plan to leave a forward pass to aten that multiplies two matrices as they lie."""
    p, g = problem, problem.geometry
    if target.backend != "cuda" or "aten" in target.without or p.large or p.direction != "forward" or g.groups > 1:
        return None
    if g.taps > 1 or max(g.stride) > 1 or any(g.padding) or p.source != "width" or p.destination != "width":
        return None
    left = min(p.c_in, p.c_out) >= shift.WIDE and (p.dtype in HALF or how == "tf32")
    return Plan("aten", LEFT["product"]) if left else None


HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def _few(problem: Problem, how: str, target: Target, portable: bool = False) -> tuple[few.Few | None, str]:
    """The few-channel kernels' tile, or why they do not take the problem: "" if its channels are not few.
    portable: whether the portable kernels are what is left."""
    p, g = problem, problem.geometry.groups
    if "few" in target.without:
        return None, "the few-channel kernels are left out"
    channels = p.c_in // g, p.c_out // g
    c_src, c_dst = reversed(channels) if p.direction == "backward_input" else channels
    refused = few.refuse(
        p.direction, p.geometry, c_src, c_dst, p.large, how, p.source, p.destination, p.whole, portable
    )  # fmt: skip
    if refused:
        return None, "" if refused == few.FULL else refused
    last = few.by_channels(g, c_src, p.whole)
    half = p.dtype in HALF
    tile = few.choose(p.direction, p.geometry, p.batch, c_src, c_dst, p.input_size, half, last, target, portable)
    return tile, "too few pixels for the few-channel kernels"


def _columns(problem: Problem, how: str, why: str, target: Target) -> tuple[Plan | None, str]:
    """The column kernels' plan, or why they do not take the problem."""
    p, g = problem, problem.geometry.groups
    if "columns" in target.without:
        return None, "the column kernels are left out"
    c_in, element_size = p.c_in // g, p.dtype.itemsize
    sizes = g, c_in, p.c_out // g * p.geometry.taps, p.batch * prod(p.input_size), element_size
    if refused := columns.refuse(*sizes, p.large, p.weight):
        return None, refused
    tile: columns.Columns | columns.Scatter
    tile, splits, time = columns.choose(*sizes, target)
    if columns.scatters(p.geometry, p.input_size):
        at_once = columns.scatter(sizes[2], c_in, element_size, target)
        if (estimate := columns.scattered(at_once, *sizes, target)) <= time:
            tile, splits, time = at_once, 1, estimate
    other = _gather(p, False, how, "", target)
    t = other.config
    assert isinstance(t, Config)
    steps = cdiv(_taps(p.geometry) * cdiv(c_in, t.block_k), other.splits)
    streamed = steps * (t.block_m + t.block_n) * t.block_k * element_size
    weight = p.c_in * p.c_out // g * p.geometry.taps * element_size
    if time > columns.LESS * columns.packed(weight, streamed, other.splits):
        return None, "the columns would be more to move than a packed weight"
    return Plan("columns", f"{why}: reading the weight takes the time", how, tile, splits), ""


def _narrow(problem: Problem, how: str, why: str, target: Target) -> Plan | None:
    """The column kernels' plan for a forward pass of which each output has one tap and all taps fit into one tile, or None."""
    p, geometry = problem, problem.geometry
    if (
        p.direction != "forward"
        or geometry.groups > 1
        or p.large
        or p.weight == "strided"
        or "columns" in target.without
    ):
        return None
    width = p.c_out * geometry.taps
    if width > columns.NARROW or p.c_in < 16 or not columns.scatters(geometry, p.input_size):
        return None
    return Plan(
        "columns", f"{why}; each output has one tap", how, columns.scatter(width, p.c_in, p.dtype.itemsize, target)
    )


def _few_columns(problem: Problem, how: str, target: Target) -> columns.Columns | None:
    """The column kernels' tile for a forward pass of few output channels, or None."""
    p, geometry = problem, problem.geometry
    if p.direction != "forward" or geometry.groups > 1 or "columns" in target.without:
        return None
    pixels = p.batch * prod(p.input_size)
    return columns.of_few(p.c_in, p.c_out, geometry.taps, pixels, p.dtype.itemsize, how, p.large, p.weight, target)


def _weight_columns(problem: Problem, target: Target) -> columns.WeightColumns | None:
    """The tile of a weight's gradient that is mostly writing, or None."""
    p, g = problem, problem.geometry.groups
    if "columns" in target.without:
        return None
    pixels, output = prod(p.input_size), prod(p.geometry.output_size(p.input_size))
    activations = p.batch * (p.c_in * pixels + p.c_out * output)
    width = p.c_out // g * p.geometry.taps
    return columns.of_weight(g, p.c_in // g, width, p.batch * pixels, activations, p.dtype.itemsize, p.large)


def _long(problem: Problem, is_direct: bool, why: str, target: Target) -> Plan | None:
    """The long-stride kernels' plan, or None where they do not take the problem."""
    p, g = problem, problem.geometry.groups
    c_in, c_out = p.c_in // g, p.c_out // g
    width = (p.source if p.direction == "backward_input" else p.destination) == "width"
    if "long" in target.without or not long.takes(p.direction, p.geometry, c_in, c_out, is_direct, p.large, width):
        return None
    tile, splits = long.choose(p.direction, p.geometry, p.batch, c_in, c_out, p.input_size, target)
    side_by_side = "phases" if p.direction == "forward" else "taps"
    return Plan("long", f"{why}: with such strides {side_by_side} lie side by side", "", tile, splits)


def _shift(problem: Problem, how: str, why: str, target: Target) -> tuple[Plan | None, str]:
    """The shift kernel's plan, or why it does not take the problem."""
    p = problem
    if "shift" in target.without:
        return None, "the shift kernel is left out"
    g = p.geometry.groups
    c_in, c_out = p.c_in // g, p.c_out // g
    refused = shift.refuse(p.geometry, c_in, c_out, p.large, how, p.source, p.destination, target)
    if refused:
        return None, refused
    dense = p.dense and (g == 1 or p.batch == 1)  # as a group's part of the tensors is
    chosen = shift.choose(
        p.geometry, p.batch, c_in, c_out, p.input_size, HALVES.get(p.dtype, how), p.source, p.destination, p.vector,
        dense, target.triton >= shift.ROUNDING_TRITON, target.processors,
    )  # fmt: skip
    if not chosen or (chosen[2] > 1 and g > 1 and p.batch > 1):  # a group's part of the output is not dense then
        return None, "none of the shift kernel's tiles fits or fills the GPU"
    tile, arranged, splits = chosen
    return Plan("shift", why, how, tile, splits, arranged=arranged), ""


@lru_cache(maxsize=8192)
def plan(problem: Problem, target: Target) -> Plan:
    """The family, configuration and reason for one pass; pure, deterministic and cached."""
    reason = unsupported(target)
    if reason:
        return Plan("aten", reason)
    geometry, size = problem.geometry, problem.input_size
    if not problem.c_out:
        return Plan("aten", "there are no output channels")
    # The kernels index an axis in 32 bits, padded to whole tiles of at most 1024 pixels.
    reach = [
        o + 2 * a.padding + 1024 * a.stride + a.dilation for a, o in zip(geometry.axes, geometry.output_size(size))
    ]
    if max(reach) >= 2**31 - 2**16:
        return Plan("aten", "a spatial axis or its stride is too long for 32-bit indices")
    g = geometry.groups
    c_in, c_out = problem.c_in // g, problem.c_out // g
    is_direct = g > 1 and max(c_in, c_out) <= DIRECT_CHANNELS
    how = "" if is_direct else precision(problem, target)
    why = f"{c_in} to {c_out} channels" + (f" in each of {g} groups" if g > 1 else "")
    if left := _leave_product(problem, how, target):
        return left
    if all_taps := _few_columns(problem, how, target):
        return Plan("columns", f"{why}: so few that all taps are one product", how, all_taps)
    thin, refused = _few(problem, how, target)
    if thin:
        return _few_plan(problem, f"{why}: too few for the tensor core", thin, target)
    why += f"; {refused}" if refused else ""
    if problem.direction == "backward_weight" and not is_direct and (tile := _weight_columns(problem, target)):
        return Plan("columns", f"{why}: writing the weight takes the time", "", tile)
    if problem.direction == "forward" and not is_direct:
        for family in (_columns, _shift):
            chosen, refused = family(problem, how, why, target)
            if chosen:
                return chosen
            why += f"; {refused}"
    if strided := _long(problem, is_direct, why, target):
        return strided
    if left := _leave(problem, is_direct, how, target):
        return left
    if problem.direction == "forward" and not is_direct:
        if narrow := _narrow(problem, how, why, target):
            return narrow
        thin, _ = _few(problem, how, target, portable=True)
        if thin:
            return _few_plan(problem, f"{why}; too few for the tensor core", thin, target)
    if is_direct:
        why += f"; they would fill {max(c_in, c_out)}/16 of a tensor-core tile"
    if problem.direction == "backward_weight":
        return _weight_sums(problem, is_direct, how, why, target)
    return _gather(problem, is_direct, how, why, target)


def _few_plan(problem: Problem, why: str, tile: few.Few, target: Target) -> Plan:
    """The plan of the few-channel kernels: a weight's gradient is split over pixels."""
    if problem.direction != "backward_weight":
        return Plan("few", why, "", tile)
    geometry, columns = problem.geometry, problem.c_in * problem.c_out // problem.geometry.groups
    tiles = few.tiles(tile, geometry, problem.batch, problem.input_size, False)
    programs = geometry.axes3[0].kernel * columns // tile.lanes
    elements = geometry.taps * columns
    return Plan("few", why, "", tile, *configs.splits(tiles, programs, elements, tile.pixels, target))


def _weight_sums(problem: Problem, is_direct: bool, how: str, why: str, target: Target) -> Plan:
    """The portable plan of backward_weight."""
    geometry, size, g = problem.geometry, problem.input_size, problem.geometry.groups
    c_in, c_out = problem.c_in // g, problem.c_out // g
    rows, width = problem.batch * prod(size[:-1]), size[-1]
    if is_direct:
        columns = problem.c_in * c_out
        config = configs.direct(rows, width, columns, problem.channels_last, target)
        pixels, programs = config.block_m, geometry.taps * cdiv(columns, config.block_n)
    else:
        element_size = problem.dtype.itemsize
        vectors = problem.source == "vectors"
        config = configs.weight_gemm(rows, width, c_in, c_out, element_size, how, vectors, target)
        pixels = config.block_k
        programs = geometry.taps * g * cdiv(c_in, config.block_m) * cdiv(c_out, config.block_n)
    tiles = cdiv(rows, pixels // config.box_w) * cdiv(width, config.box_w)
    elements = geometry.taps * problem.c_in * c_out
    splits, per_split = configs.splits(tiles, programs, elements, pixels, target)
    return Plan("direct" if is_direct else "gemm", why, how, config, splits, per_split)


def _gather(problem: Problem, is_direct: bool, how: str, why: str, target: Target) -> Plan:
    """The portable plan of the forward pass or backward_input."""
    geometry, size, g = problem.geometry, problem.input_size, problem.geometry.groups
    if problem.direction == "forward":
        output, taps = geometry.output_size(size), _taps(geometry)
        quotient = [cdiv(o, s) for o, s in zip(output, geometry.stride)]
        phases = prod(min(o, s) for o, s in zip(output, geometry.stride))
        c_src, c_dst = problem.c_in // g, problem.c_out // g
    else:
        output, taps, quotient, phases = size, geometry.taps, list(size), 1
        c_src, c_dst = problem.c_out // g, problem.c_in // g
    rows, width = problem.batch * prod(quotient[:-1]), quotient[-1]
    if is_direct:
        return Plan("direct", why, how, configs.direct(rows, width, c_dst * g, problem.channels_last, target))
    vectors, element_size = problem.source == "vectors", problem.dtype.itemsize
    config = configs.gather_gemm(
        rows, width, phases * g, c_src, c_dst, element_size, how, vectors, problem.large, target
    )
    pixels = cdiv(rows, config.block_m // config.box_w) * cdiv(width, config.box_w)
    programs, steps = pixels * phases * g * cdiv(c_dst, config.block_n), taps * cdiv(c_src, config.block_k)
    elements = problem.batch * c_dst * g * prod(output)
    return Plan("gemm", why, how, config, configs.gather_splits(programs, steps, elements, target))
