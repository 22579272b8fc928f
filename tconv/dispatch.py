"""Which kernel family runs a pass, with which configuration, and why: the one place that decides.

`refuse` looks at what a tensor is (device, dtype, layout) and sends what tconv does not accelerate to
aten before any operator of tconv is called.  `plan` looks at one pass of one problem on one device, and asks the families.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import blocks, probe, shift
from .configs import Target
from .families import FAMILIES, Asked
from .problem import Plan, Problem, precision

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

# float64 runs on the kernels in the interpreter alone, where gradcheck wants it.
DTYPES = (torch.float16, torch.bfloat16, torch.float32) + ((torch.float64,) if INTERPRET else ())


def refuse(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why these tensors (after autocast) are left to aten, or None when tconv takes them."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return "an argument is not a tensor"
    for t in tensors:
        if type(t) not in PLAIN and not _is_plain(t):
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


PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor subclass (a fake tensor, say) behaves as a tensor; DTensor and the like do not."""
    own = type(t).__torch_function__
    default = getattr(own, "__func__", own) is torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return (default or own is torch._C._disabled_torch_function_impl) and not is_traceable_wrapper_subclass(t)


HOPPER = "blocks", "grid", "rows", "shift"  # the families that other GPUs do not have
LEFT_OUT = "few", "columns", "long", "patches", *HOPPER, "aten"  # what `without` takes
_without: tuple[str, ...] = ()  # what `without` says


@contextmanager
def without(*families: str) -> Iterator[None]:
    """Inside, in every thread, `plan` does without some families, to measure or test the others.  An inner one replaces
    what an outer one says; threads should not have different ones at a time.

    families: of "few", "columns", "long", "patches", "blocks", "grid", "rows", "shift" and "aten".  What no kernel of tconv can do is left to aten all the same.
    """
    global _without
    if unknown := [name for name in families if name not in LEFT_OUT]:
        raise ValueError(f"families: expected {', '.join(LEFT_OUT[:-1])} or {LEFT_OUT[-1]}, got {unknown[0]!r}")
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
    return _without if torch._C._get_cudnn_enabled() or "aten" in _without else (*_without, "aten")


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


def allow_tf32() -> bool:
    """Torch's flag for fp32 convolutions as it stands now: torch.backends.cudnn.conv.fp32_precision (whose property takes the host 3 us),
    which torch.backends.cudnn.allow_tf32 and the more general fp32_precision settings also set."""
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


def unsupported(target: Target) -> str | None:
    if target.backend == "cuda" and target.arch < 80:
        return f"compute capability {target.arch / 10} is below 8.0"
    return None


def decide(problem: Problem, target: Target, device: torch.device) -> Plan:
    """`plan` for a pass on a device, which must pass the probe before a Hopper kernel runs there."""
    chosen = plan(problem, target)
    if device.type != "cuda" or not isinstance(chosen.config, (blocks.Blocks, shift.Shift)):
        return chosen
    fault = probe.fault(device, chosen.config.size)
    if fault is None:
        return replace(chosen, lasting=False)
    return plan(problem, replace(target, fault=fault)) if fault else chosen


@lru_cache(maxsize=8192)
def plan(problem: Problem, target: Target) -> Plan:
    """The family, configuration and reason for one pass; pure, deterministic and cached."""
    if reason := unsupported(target):
        return Plan("aten", reason)
    geometry = problem.geometry
    if not problem.c_out:
        return Plan("aten", "there are no output channels")
    # The kernels index an axis in 32 bits, padded to whole tiles of at most 1024 pixels.
    output = geometry.output_size(problem.input_size)
    if any(o + 2 * a.padding + 1024 * a.stride + a.dilation >= 2**31 - 2**16 for a, o in zip(geometry.axes, output)):
        return Plan("aten", "a spatial axis or its stride is too long for 32-bit indices")
    c_in, c_out = problem.channels
    why = f"{c_in} to {c_out} channels" + (f" in each of {geometry.groups} groups" if geometry.groups > 1 else "")
    how = "" if problem.is_direct else precision(problem, target)
    for family in FAMILIES:
        found = family(Asked(problem, target, how, why))
        if isinstance(found, Plan):
            return found
        why += f"; {found}" if found else ""
    raise AssertionError("the last family takes what is left")
