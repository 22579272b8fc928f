"""Who is measured.  A provider is a function that takes a `Work` and returns a call that does it, or None.

One of your own takes a few lines, and `--provider tconv cudnn mine:fast`:

    # mine.py
    def fast(work):
        if work.pass_name == "forward":
            return lambda: my_conv_transpose(work.input, work.weight, work.bias, **work.layer.options)

It is checked as tconv is, timed beside the others and counts among those that tconv is compared with.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import dispatch
from ..explain import Explanation, explain
from ..problem import PASSES, Plan
from ..workloads import Layer
from . import check

SMALL_MS = 0.05  # layers whose roof is below this are also measured under a CUDA graph
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass
class Work:
    """What is to be done: one pass of one case, on tensors that are ready in the case's memory format.

    pass_name: "forward", "backward_input" or "backward_weight" return one tensor; "training" returns the output and
    the gradients of input, weight and bias (where there is one), in that order.
    """

    pass_name: str
    layer: Layer
    module: nn.Module  # torch's own: the layer's module, or a whole problem
    inputs: tuple[torch.Tensor, ...]  # the module's
    grad_output: torch.Tensor | None
    memory_format: str
    is_problem: bool
    roof_ms: float

    @property
    def input(self) -> torch.Tensor:
        return self.inputs[0]

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module.bias  # type: ignore[return-value]


@dataclass(frozen=True)
class Provider:
    """A way to do a Work, and the settings under which it is called."""

    name: str
    make: Callable[[Work], Callable[[], Any] | None]
    about: str
    benchmark: bool = True  # torch.backends.cudnn.benchmark during its calls
    own_thread: bool = False  # measure.call says why
    yardstick: bool = False  # torch's own arithmetic: its error is what others are bounded by
    rival: bool = True  # tconv's time is compared with it
    graph: bool = False  # replays a CUDA graph; compared with its like
    needs_gpu: bool = True


def last(t: torch.Tensor) -> torch.Tensor:
    """t in channels_last memory format."""
    return t.contiguous(memory_format=LAST[t.ndim])


def train(module: Callable, inputs, parameters, grad_output) -> tuple:
    """The output of one training step and all gradients."""
    output = module(*inputs)
    return (output, *torch.autograd.grad(output, (*inputs, *parameters), grad_output))


def _module_call(work: Work, module: Callable, parameters) -> Callable[[], Any]:
    if work.pass_name == "forward":
        return lambda: module(*work.inputs)
    inputs = tuple(t.detach().requires_grad_(True) for t in work.inputs)
    return lambda: train(module, inputs, parameters, work.grad_output)


def _aten_backward(work: Work, input, weight, grad_output) -> torch.Tensor:
    return check.aten_pass(work.pass_name, (input, weight, None, grad_output), work.layer.options)


def tconv(work: Work):
    from .. import ops
    from ..convert import convert

    g = work.layer.geometry
    if work.pass_name == "backward_input":
        size = list(work.input.shape[2:])
        return lambda: ops.backward_input(work.grad_output, work.weight, size, *g.layer)
    if work.pass_name == "backward_weight":
        return lambda: ops.backward_weight(work.grad_output, work.input, g.kernel, *g.layer)
    module = copy.deepcopy(work.module)
    convert(module)
    return _module_call(work, module, list(module.parameters()))


def portable(work: Work):
    """tconv with the kernels alone that every GPU runs."""
    function = tconv(work)

    def call():
        with dispatch.without(*dispatch.HOPPER, "aten"):
            return function()

    return call


def plans(name: str, work: Work) -> dict[str, Plan]:
    """How tconv, as a provider of this name, runs each pass of a layer; of other providers nothing."""
    if name not in ("tconv", "tconv-portable", "tconv-graph") or work.is_problem:
        return {}
    with dispatch.without(*((*dispatch.HOPPER, "aten") if name == "tconv-portable" else ())):
        told = explain(work.input, work.weight, work.bias, **work.layer.options)
    assert isinstance(told, Explanation)
    asked = PASSES if work.pass_name == "training" else (work.pass_name,)
    return {p.name: p.plan for p in told.passes if p.name in asked}


def cudnn(work: Work):
    if work.pass_name in ("forward", "training"):
        return _module_call(work, work.module, list(work.module.parameters()))
    return lambda: _aten_backward(work, work.input, work.weight, work.grad_output)


def compiled(work: Work):
    if work.pass_name not in ("forward", "training"):
        return None  # the compiler sees whole functions, not single passes of a backward
    torch._dynamo.reset()
    module = copy.deepcopy(work.module)
    if work.pass_name == "forward":
        for x in work.inputs:  # or its CUDA graph would copy the input at each call
            torch._dynamo.mark_static_address(x)
    return _module_call(work, torch.compile(module, mode="max-autotune", dynamic=False), list(module.parameters()))


def _can_convert(work: Work) -> bool:
    return work.memory_format == "contiguous" and work.input.ndim in LAST and not work.is_problem


def cudnn_nhwc(work: Work):
    if not _can_convert(work):
        return None
    x, grad = last(work.input), None if work.grad_output is None else last(work.grad_output)
    module = copy.deepcopy(work.module)
    module.weight.data = last(work.weight.data)  # type: ignore[operator, union-attr]
    there = Work(work.pass_name, work.layer, module, (x,), grad, "channels_last", False, work.roof_ms)
    return cudnn(there)


def cudnn_nhwc_convert(work: Work):
    if not _can_convert(work):
        return None
    if work.pass_name in ("forward", "training"):

        def module(x):  # aten brings the weight into the input's format by itself
            return work.module(last(x)).contiguous()

        return _module_call(work, module, list(work.module.parameters()))
    x, w = work.input, work.weight
    if work.pass_name == "backward_input":
        like = torch.empty_like(x, memory_format=LAST[x.ndim])  # only its shape and strides are read
        return lambda: _aten_backward(work, like, last(w), last(work.grad_output)).contiguous()  # type: ignore[arg-type]
    like = torch.empty_like(w, memory_format=LAST[w.ndim])
    return lambda: _aten_backward(work, last(x), like, last(work.grad_output)).contiguous()  # type: ignore[arg-type]


def _graphed(make):
    def graphed(work: Work):
        if work.roof_ms > SMALL_MS or work.is_problem:
            return None
        function = make(work)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile and choose plans before the capture
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function()

        def replay(owner=function):  # the graph reads the weights that `function` owns
            graph.replay()
            return captured

        return replay

    return graphed


PROVIDERS = {
    p.name: p
    for p in (
        Provider("tconv", tconv, "tconv", rival=False, needs_gpu=False),
        Provider("tconv-portable", portable, "tconv without the kernels for Hopper GPUs and without aten", rival=False),
        Provider("cudnn", cudnn, "torch (cuDNN), torch.backends.cudnn.benchmark = True", yardstick=True),
        Provider("cudnn-default", cudnn, "torch (cuDNN), default flags", False, True, yardstick=True),
        Provider("compile", compiled, "torch.compile, mode max-autotune", yardstick=True),
        Provider(
            "cudnn-nhwc",
            cudnn_nhwc,
            "cuDNN on tensors converted to channels_last beforehand: another problem's time, so no rival",
            yardstick=True,
            rival=False,
        ),
        Provider("cudnn-nhwc-convert", cudnn_nhwc_convert, "the same with the conversions counted", yardstick=True),
        Provider("tconv-graph", _graphed(tconv), "tconv, replayed from a CUDA graph", rival=False, graph=True),
        Provider("cudnn-graph", _graphed(cudnn), "cudnn, replayed from a CUDA graph", yardstick=True, graph=True),
    )
}
# torch.compile takes seconds a case to compile, which whole suites do not have; it is measured when asked for, and
# on single layers; so are the portable kernels, which matter to other GPUs.
DEFAULT = tuple(name for name in PROVIDERS if name not in ("compile", "tconv-portable"))


def find(name: str) -> Provider:
    """A provider by its name, or a function by "module:function".  Raises ValueError saying what is wrong."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown provider {name!r}, expected one of {', '.join(PROVIDERS)}, or module:function for one of your own"
        )
    try:
        make = getattr(import_module(module), function)
    except Exception as error:
        raise ValueError(f"provider {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return Provider(name, make, (make.__doc__ or "yours").splitlines()[0], needs_gpu=False)


def import_module(name: str):
    """A module by name, also from the current directory, as `python -m` finds it."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    return importlib.import_module(name)
