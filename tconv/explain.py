"""explain(): which kernel runs a call or a model's layers, with which configuration, or why aten does."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import functional, launch, layouts
from .dispatch import decide, refuse, target_of
from .functional import as_int, as_tuple
from .geometry import Geometry, check, make_geometry
from .modules import COUNTERPARTS
from .problem import PASSES, Plan, Problem

_WORDS = {
    "half": "16-bit operands, fp32 accumulation",
    "widen": "bf16 widened to fp32 (interpreter)",
    "tf32": "TF32, operands rounded to nearest even",
    "tf32x3": "fp32 as three TF32 products",
    "ieee": "IEEE fp32",
    "": "fp32 multiply-adds",
}


@dataclass(frozen=True)
class PassExplanation:
    """One pass of one layer: the Problem that was put to `dispatch.plan`, and its Plan."""

    name: str
    problem: Problem | None
    plan: Plan

    def __str__(self) -> str:
        if self.plan.config is None:
            text = f"{self.name}: {self.plan.family}, because {self.plan.reason}"
            text += f"; {_WORDS[self.plan.precision]}" if self.plan.precision else ""
            text += "; of channels_last copies" if self.plan.arranged else ""
            return text + (f"; sum in {self.plan.splits} parts of the batch" if self.plan.splits > 1 else "")
        text = f"{self.name}: {self.plan.family} ({self.plan.reason}); {_WORDS[self.plan.precision]}; tile {self.plan.config.describe()}"
        if self.plan.arranged:
            inner = "pixels" if self.plan.family == "few" else "channels"
            source = {
                "backward_input": "a copy of the output's gradient",
                "backward_weight": "copies of both activations",
            }
            text += f", of {source.get(self.name, 'a copy of the input')} with {inner} innermost"
        if self.plan.splits > 1:
            text += f"; sum in {self.plan.splits} parts"
        return text


@dataclass(frozen=True)
class Explanation:
    """Why a call runs as it does: its geometry, the taps of each phase along each axis, and its three passes."""

    layer: str
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    geometry: Geometry | None
    passes: tuple[PassExplanation, ...]
    module: str = ""

    @property
    def phases(self) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
        """For each axis, for each phase, its (tap, input offset) pairs."""
        if self.geometry is None:
            return ()
        output = self.geometry.output_size(self.input_shape[-self.geometry.ndim :])
        return tuple(
            tuple(tuple(a.taps(p)) for p in range(min(a.stride, o))) for a, o in zip(self.geometry.axes, output)
        )

    def __str__(self) -> str:
        head = f"{self.module}: " if self.module else ""
        lines = [f"{head}{self.layer}, input {'x'.join(map(str, self.input_shape))} {str(self.dtype)[6:]}"]
        if self.geometry is not None:
            counts = [f"{len(axis)} ({_counts([len(taps) for taps in axis])})" for axis in self.phases]
            lines.append(f"  phases: {' x '.join(counts)}")
        lines += [f"  {p}" for p in self.passes]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelExplanation:
    """The explanations of a model's transposed convolutions, in the order in which they ran."""

    layers: tuple[Explanation, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "no transposed convolution ran"
        return "\n".join(map(str, self.layers))


def _counts(taps: list[int]) -> str:
    """How many phases have how many taps, in words."""
    many = len(set(taps)) > 1
    parts = [f"{f'{n} of ' if many else ''}{t} tap{'' if t == 1 else 's'}" for t, n in sorted(Counter(taps).items())]
    return ", ".join(parts) + ("" if many or len(taps) == 1 else " each")


def explain(first, *args, **kwargs) -> Explanation | ModelExplanation:
    """Say which kernel runs, in which configuration and phases, or why the layer is left to aten.

    `explain(input, weight, bias=None, stride=1, ...)` takes the arguments of conv_transpose1d, 2d or 3d (the
    weight's rank says which) and explains the call, which does not run (on a Hopper GPU tconv
    may try a tiny product of its own).
    `explain(model, *inputs, **kwargs)` runs the model once, in the mode it is in and without gradients, on the example
    inputs and explains every transposed convolution that ran, converted or not.

    Returns an object that prints as text and carries the data (`passes`, `phases`, `geometry`; `layers` for a model).
    """
    if isinstance(first, nn.Module):
        return _explain_model(first, args, kwargs)
    return _explain_call(first, *args, **kwargs)


def _explain_call(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, module="", reason=None
) -> Explanation:
    ndim = weight.ndim - 2
    if ndim not in (1, 2, 3):
        raise RuntimeError(f"expected weight of 3 to 5 dimensions, got weight of size {list(weight.shape)}")
    batched = input.unsqueeze(0) if input.ndim == ndim + 1 else input
    stride, padding, output_padding, dilation = (
        as_tuple(v, n, ndim)
        for v, n in (
            (stride, "stride"),
            (padding, "padding"),
            (output_padding, "output_padding"),
            (dilation, "dilation"),
        )
    )
    groups = as_int(groups, "groups", ndim, "an int")
    bias_shape = None if bias is None else bias.shape
    check(ndim, batched.shape, weight.shape, bias_shape, stride, padding, output_padding, groups, dilation)
    geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, output_padding, groups, dilation)
    batched, weight, bias = functional.autocast(input.device.type, batched, weight, bias)
    reason = reason or refuse(batched, weight, bias)
    c_out = weight.shape[1] * groups
    passes = []
    # The output and its gradient come in torch's layout; on the meta device they take no memory.
    output = torch.empty(
        (batched.shape[0], c_out, *geometry.output_size(batched.shape[2:])),
        dtype=batched.dtype,
        device="meta",
        memory_format=layouts.memory_format(batched, weight),
    )
    for name in PASSES:
        if reason is not None or batched.device.type == "meta":
            passes.append(PassExplanation(name, None, Plan("aten", reason or "meta tensors have no kernels")))
            continue
        source, destination = (output, batched) if name == "backward_input" else (batched, output)
        where = name, geometry, batched.shape, c_out
        of_forward = (weight, bias) if name == "forward" else ()
        problem = launch.make_problem(*where, source, destination, *of_forward)
        chosen = decide(problem, target_of(batched.device), batched.device)
        passes.append(PassExplanation(name, problem, chosen))
    text = f"conv_transpose{ndim}d {batched.shape[1]} to {c_out} {geometry.describe()}"
    return Explanation(text, tuple(input.shape), batched.dtype, geometry, tuple(passes), module)


def _explain_model(model: nn.Module, args, kwargs) -> ModelExplanation:
    layers: list[Explanation] = []
    names = {id(m): name for name, m in model.named_modules()}
    stack: list[nn.Module] = []
    thread = threading.get_ident()
    falling_back = False  # tconv has recorded a call and hands it to aten now

    def record(call, options, reason=None):
        name = names.get(id(stack[-1]), "") if stack else ""
        layers.append(_explain_call(*call, **options, module=name, reason=reason))

    def observe(call):
        nonlocal falling_back
        # Under nested overrides, the call that falls to aten meets the outer one on its way.
        if threading.get_ident() == thread and not falling_back:
            record(call, {})
            falling_back = layers[-1].passes[0].problem is None and call[0].device.type != "meta"

    class Aten(TorchFunctionMode):
        def __torch_function__(self, func, types, call=(), options=None):
            nonlocal falling_back
            options = options or {}
            before = len(layers)
            result = func(*call, **options)
            if func in functional.ATEN.values():
                if len(layers) == before and not falling_back:
                    converted = stack and type(stack[-1]) in COUNTERPARTS.values()
                    record(call, options, None if converted else "not converted, and outside tconv.override()")
                falling_back = False
            return result

    def leave(*_):
        stack.pop()

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _: stack.append(m)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    functional.observers.append(observe)
    try:
        with torch.no_grad(), Aten():
            model(*args, **kwargs)
    finally:
        functional.observers.remove(observe)
        for hook in hooks:
            hook.remove()
    return ModelExplanation(tuple(layers))
