"""A whole model of the user's: the share of its step that transposed convolutions take, and what converting gives."""

from __future__ import annotations

import contextlib
import copy
import statistics
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from .. import convert
from ..explain import explain
from . import check, measure
from .measure import Run
from .providers import LAST, import_module
from .terminal import Refused

# Converting may double a model's error against fp64, or bring it to a unit of the precision: layers behind can enlarge
# what one rounds, and torch may compute in full fp32 what is allowed to be TF32.
UNIT = {"tf32": 1e-3, "fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}


def load(spec: str) -> tuple[nn.Module, Any]:
    """The model and its example inputs (a tuple, or a dict of keyword arguments) that "package.module:factory" returns.  Raises
    Refused saying what is wrong."""
    where, colon, name = spec.partition(":")
    if not colon or not name:
        raise Refused(f"expected --model package.module:factory, got {spec!r}")
    try:
        factory = getattr(import_module(where), name)
    except ImportError as error:
        raise Refused(f"--model {spec}: cannot import {where}: {error}") from error
    except AttributeError as error:
        raise Refused(f"--model {spec}: {where} has no {name}") from error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise Refused(f"--model {spec}: importing {where} raised {told}") from error
    try:
        made = factory()
    except Exception as error:
        raise Refused(f"--model {spec}: {name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple | list) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise Refused(f"--model {spec}: expected {name}() to return (model, example inputs), got {type(made).__name__}")
    model, inputs = made
    if isinstance(inputs, tuple | list):
        return model, tuple(inputs)
    return model, inputs if isinstance(inputs, dict) else (inputs,)


def _run(function: Callable, inputs: tuple | dict) -> Any:
    return function(**inputs) if isinstance(inputs, dict) else function(*inputs)


def _map(function: Callable, value: Any) -> Any:
    """A tensor, or tensors in tuples, lists and dicts, with function applied to each."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_map(function, v) for v in value)
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    return value


def _floats(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map(lambda t: found.append(t) if t.is_floating_point() else None, value)
    return found


class _Mark(torch.autograd.Function):
    """The identity; calls `record` when the gradient comes through."""

    @staticmethod
    def forward(ctx, x, record):
        ctx.record = record
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.record()
        return grad, None


class Marks:
    """CUDA events around every transposed convolution module of a model, forward and backward, while entered."""

    def __init__(self, model: nn.Module):
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, _ConvTransposeNd)}
        self.spans: dict[str, list[list]] = {name: [] for name in self.layers}  # [start, end, end, ...]
        self.handles: list = []

    def __enter__(self):
        for name, module in self.layers.items():
            self.handles.append(module.register_forward_pre_hook(partial(self._before, name)))
            self.handles.append(module.register_forward_hook(partial(self._after, name)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _event(self, span: list) -> None:
        span.append(torch.cuda.Event(enable_timing=True))
        span[-1].record()

    def _before(self, name: str, module, inputs):
        backward: list = []
        self.spans[name] += [[], backward]
        x = inputs[0] if inputs else None  # as a keyword it cannot be marked
        if x is not None and torch.is_grad_enabled():
            if x.requires_grad:
                x = _Mark.apply(x, partial(self._event, backward))
            elif module.weight.requires_grad:  # the first layer: its backward ends with the weight's gradient
                self.handles.append(module.weight.register_hook(lambda grad: self._event(backward)))
        self._event(self.spans[name][-2])
        return None if x is None else (x, *inputs[1:])

    def _after(self, name: str, module, inputs, output):
        forward, backward = self.spans[name][-2:]
        self._event(forward)
        return _Mark.apply(output, partial(self._event, backward)) if output.requires_grad else output

    def ms(self) -> dict[str, float]:
        """Milliseconds by layer; call after a synchronize."""
        return {
            name: sum(max(s[0].elapsed_time(e) for e in s[1:]) for s in spans if len(s) > 1)
            for name, spans in self.spans.items()
        }


def _step(model: nn.Module, inputs: tuple | dict, training: bool, amp: torch.dtype | None) -> Any:
    context = torch.autocast("cuda", amp) if amp else contextlib.nullcontext()
    with context:
        output = _run(model, inputs)
    if not training:
        return output
    loss = sum(t.float().square().mean() if amp else t.square().mean() for t in _floats(output))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _floats(output), torch.autograd.grad(loss, parameters, allow_unused=True)  # type: ignore[arg-type]


def _error(actual, exact) -> float:
    """Root mean square error of a list of tensors, relative to the list's: some gradients are exactly nothing."""
    pairs = [(a.detach().double(), e.detach()) for a, e in zip(actual, exact) if e is not None]
    wrong = sum(float((a - e).square().sum()) for a, e in pairs)
    return (wrong / max(sum(float(e.square().sum()) for _, e in pairs), 1e-300)) ** 0.5


def _check(model: nn.Module, ours: nn.Module, inputs: tuple | dict, precision: str, amp) -> dict:
    """Outputs and all gradients in eval mode against a float64 copy: both errors, and whether ours is in bounds."""
    states, name = [m.training for m in (model, ours)], "fp64"
    try:
        model.eval(), ours.eval()
        exact_model = copy.deepcopy(model).double()
        exact_inputs = _map(lambda t: t.double() if t.is_floating_point() else t, inputs)
        run = {}
        for name, m, x, a in (
            ("fp64", exact_model, exact_inputs, None),
            ("torch", model, inputs, amp),
            ("tconv", ours, inputs, amp),
        ):
            step = Run(name, partial(_step, m, x, True, a), benchmark=False, own_thread=True, grad=True)
            run[name] = measure.call(step)
    except Exception as error:
        raise Refused(f"the model cannot be checked: its {name} step raised {type(error).__name__}: {error}") from error
    finally:
        for m, state in zip((model, ours), states):
            m.train(state)
    rms = {n: max(_error(actual, exact) for actual, exact in zip(run[n], run["fp64"])) for n in ("torch", "tconv")}
    right = rms["tconv"] <= max(2 * rms["torch"], UNIT[precision])  # False for NaN
    return {"rms_err": rms, "status": "ok" if right else "wrong"}


def _shares(model: nn.Module, step: Callable, training: bool, rounds: int) -> tuple[float, dict[str, float]]:
    """The share of the step inside transposed convolutions, and milliseconds by layer, medians over some steps."""
    totals, layers = [], []
    for i in range(rounds + 1):
        with Marks(model) as marks:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            measure.call(Run("", step, grad=training))
            end.record()
            torch.cuda.synchronize()
        if i:
            totals.append(start.elapsed_time(end))
            layers.append(marks.ms())
    by_layer = {name: statistics.median(x[name] for x in layers) for name in marks.layers}
    return sum(by_layer.values()) / statistics.median(totals), by_layer


def measure_model(spec: str, precision: str, memory_format: str, budget: float, most: int) -> dict:
    """Rows for inference and training: torch's and the converted model's step, shares, speed-up; and by layer."""
    model, inputs = load(spec)
    check.set_precision(precision)
    model = model.cuda()
    inputs = _map(lambda t: t.cuda(), inputs)
    if memory_format == "channels_last":
        inputs = _map(lambda t: t.contiguous(memory_format=LAST[t.ndim]) if t.ndim in LAST else t, inputs)
        for p in model.parameters():
            p.data = p.data.contiguous(memory_format=LAST[p.ndim]) if p.ndim in LAST else p.data
    amp = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    ours = copy.deepcopy(model)
    report = convert(ours)
    result: dict = {
        "spec": spec,
        "precision": precision,
        "memory_format": memory_format,
        "converted": str(report),
        "check": _check(model, ours, inputs, precision, amp),
        "rows": [],
    }
    if result["check"]["status"] != "ok":
        return result
    for training in (False, True):
        steps, shares, layers = {}, {}, {}
        for name, m in (("torch", model), ("tconv", ours)):
            m.train(training)
            steps[name] = partial(_step, m, inputs, training, amp)
            shares[name], layers[name] = _shares(m, steps[name], training, 5)
        runs = [Run(name, step, grad=training) for name, step in steps.items()]
        times = measure.interleave(runs, budget, 5, most, None)
        row = {"mode": "training" if training else "inference", "share": shares, "layers": layers}
        row |= {"ms": {n: t["ms"] for n, t in times.items()}, "host_us": {n: t["host_us"] for n, t in times.items()}}
        row["ms_spread"] = {n: t["ms_spread"] for n, t in times.items()}
        result["rows"].append(row)
    return result


def describe_model(spec: str) -> str:
    """Without a GPU: the transposed convolutions that the model runs on its example inputs, and what convert makes of them."""
    model, inputs = load(spec)
    try:
        told: Any = _run(partial(explain, model), inputs)
    except Exception as error:
        raise Refused(f"--model {spec}: its inputs do not fit it: {type(error).__name__}: {error}") from error
    lines = [
        f"{layer.module or '(the model itself)'}: {layer.layer}, input {'x'.join(map(str, layer.input_shape))}"
        for layer in told.layers
    ]
    return "\n".join([*(lines or ["no transposed convolution ran"]), str(convert(model))])
