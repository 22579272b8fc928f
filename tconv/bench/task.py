"""One case at one precision in one memory format: the oracle's truth, the checks, the timings, the rows."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from . import cases, check, measure, problems, providers
from .measure import Run
from .providers import Provider, Work

SPENT: defaultdict[str, float] = defaultdict(float)  # seconds of this process, by what they went into


@contextmanager
def spent(what: str) -> Iterator[None]:
    """Count the time inside towards `what`."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        SPENT[what] += time.perf_counter() - begin


PARTS = {"training": check.RESULTS}  # what a pass returns; the other passes return what they are named after


class Truth:
    """A case's draw at full precision and what the float64 oracle makes of it, computed as it is asked for."""

    def __init__(self, case: cases.Case, kind: str, device: str):
        self.case, self.kind, self.device = case, kind, device
        layer = case.layer
        self.exact: dict = {}
        self.peers: dict = {}  # torch's own errors by precision and result: default flags, contiguous tensors
        if case.problem:
            self.module = problems.build(case).to(device)
            self.inputs = [torch.rand(s, device=device) for s in problems.input_shapes(case)]
            if kind == "half":
                for p in self.module.parameters():
                    p.data = p.data.bfloat16().float()
                self.inputs = [x.bfloat16().float() for x in self.inputs]
            return
        bias = (layer.out_channels,) if layer.bias else None
        shapes = layer.input_shape, layer.weight_shape, bias, layer.output_shape
        self.tensors = check.draw(shapes, kind, device)

    def result(self, name: str, precision: str = "") -> torch.Tensor:
        """The exact result `name`; of operands rounded to a precision, if that is given (not kept)."""
        if precision:
            return self._compute(name, precision)
        if name not in self.exact:
            with spent("oracle"):
                self.exact[name] = self._compute(name, "")
        return self.exact[name]

    def _compute(self, name: str, precision: str) -> torch.Tensor:
        if not self.case.problem:
            layer, tf32 = self.case.layer.options, precision == "tf32"
            return measure.call(_default(), lambda: check.oracle_pass(name, self.tensors, layer, tf32))
        module = copy.deepcopy(self.module).double()
        for m in module.modules():
            if precision and isinstance(m, nn.modules.conv._ConvNd):
                m.weight.data = check.rounded(m.weight.data, precision)
                m.register_forward_pre_hook(lambda m, x: (check.rounded(x[0], precision),))
        return measure.call(_default(), lambda: module(*(x.double() for x in self.inputs)))


def _default() -> Run:
    return Run("", lambda: None, benchmark=False, own_thread=True)


class Task:
    """One case at one precision in one memory format: its tensors, its peer's errors, its rows."""

    def __init__(self, request: dict, task: dict, truth: Truth):
        self.request, self.task, self.truth = request, task, truth
        self.case, self.precision = truth.case, task["precision"]
        self.dtype = check.dtype_of(self.precision)
        self.slack = 20.0 if self.case.problem else 1.0
        check.set_precision(self.precision)
        self.module, self.inputs, self.grad = self._tensors()

    def _tensors(self):
        truth, dtype = self.truth, self.dtype
        last = self.task["memory_format"] == "channels_last"

        def ready(t):
            t = t.to(dtype)
            return providers.last(t) if last and t.ndim in providers.LAST else t

        if self.case.problem:
            module = copy.deepcopy(truth.module).to(dtype)
            for m in module.modules():
                if hasattr(m, "kernel_size") and hasattr(m, "weight"):
                    m.weight.data = ready(m.weight.data)
            return module, tuple(ready(x) for x in truth.inputs), None
        x, w, bias, grad = truth.tensors
        with torch.device("meta"):
            module = problems.layer_module(self.case.layer)
        module.weight = nn.Parameter(ready(w))
        module.bias = None if bias is None else nn.Parameter(bias.to(dtype))
        return module, (ready(x),), ready(grad)

    def peer(self, name: str) -> tuple[float, float]:
        """torch's own error on this result, of contiguous tensors and with its flags as they come."""
        known = self.truth.peers
        if (key := (self.precision, name)) in known:
            return known[key]
        # aten has no 16-bit kernels for some passes on the CPU; there its fp32 result is rounded.
        gpu = self.request["gpu"]
        if self.case.problem:
            module = copy.deepcopy(self.truth.module).to(self.dtype)
            inputs = [x.to(self.dtype) for x in self.truth.inputs]
            function = lambda: module(*inputs)  # noqa: E731
        else:
            tensors = [None if t is None else t.to(self.dtype) for t in self.truth.tensors]
            tensors = tensors if gpu else [None if t is None else t.float() for t in tensors]
            function = lambda: check.aten_pass(name, tensors, self.case.layer.options)  # noqa: E731
        result = measure.call(_default(), function).to(self.dtype)
        known[key] = check.errors(result, self.truth.result(name))
        return known[key]

    def own_peer(self, name: str, provider: Provider) -> tuple[float, float]:
        """torch's own error on this result, of the case's own tensors and in the provider's mode."""
        weight, bias = (None if t is None else t.detach() for t in (self.module.weight, self.module.bias))
        tensors = self.inputs[0], weight, bias, self.grad
        run = Run("", lambda: None, provider.benchmark, provider.own_thread)
        result = measure.call(run, lambda: check.aten_pass(name, tensors, self.case.layer.options))
        return check.errors(result, self.truth.result(name))

    def judge(self, provider: Provider, pass_name: str, results, left: bool = False) -> tuple[tuple[float, float], str]:
        """The largest errors over a pass's results, and what is wrong with the first wrong one.

        left: whether the gradient of the weight is left to torch as it lies.  At TF32 torch's own is its yardstick then, since torch
        truncates operands in one memory format and not in the other.
        """
        names: tuple[str, ...] = PARTS.get(pass_name, (pass_name,))
        results = results if isinstance(results, tuple | list) else (results,)
        if len(names) == 4 and self.case.layer.bias is False:
            names = names[:3]
        if len(results) != len(names):
            return (float("nan"),) * 2, f"{len(results)} results, expected {len(names)}"
        worst, wrong = (0.0, 0.0), ""
        for name, result in zip(names, results):
            own = left and name == "backward_weight" and self.precision == "tf32"
            peer = None if provider.yardstick else self.own_peer(name, provider) if own else self.peer(name)
            rounded = lambda name=name: self.truth.result(name, self.precision)  # noqa: E731
            terms = 1 if self.case.problem else check.terms(name, self.case.layer)
            exact = self.truth.result(name)
            error, bad = check.judge(result, exact, peer, self.precision, rounded, self.slack, terms)
            worst = max(worst[0], error[0]), max(worst[1], error[1])
            if bad and not wrong:
                wrong = f"{name}: {bad}"
        return worst, wrong

    def work(self, pass_name: str, roof: float) -> Work:
        """What a provider is asked to do."""
        where = self.task["memory_format"], bool(self.case.problem), roof
        return Work(pass_name, self.case.layer, self.module, self.inputs, self.grad, *where)

    def rows(self, pass_name: str, say: Callable) -> list[dict]:
        """Check every provider on one pass, then time in turn those that are right; say which is at work."""
        gpu, case = self.request["gpu"], self.case
        if case.problem:
            case = replace(case, elements=(case.elements or 0) + self.truth.result("forward").numel())
        flops, nbytes = case.flops(pass_name), case.bytes(pass_name, self.dtype.itemsize)
        roof = measure.roof_ms(flops, nbytes, self.precision, self.request["roofs"]) if gpu else None
        work = self.work(pass_name, roof or 0.0)
        base = base_row(self.task, self.case)
        reach = measure.reach_ms(flops, nbytes, self.precision, self.request["roofs"]) if gpu else None
        base |= {"pass": pass_name, "flops": flops, "bytes": nbytes, "roof_ms": roof, "reach_ms": reach}
        rows, runs = {}, []
        for name in self.request["providers"]:
            provider = providers.find(name)
            if provider.needs_gpu and not gpu:
                continue
            say(doing=f"{pass_name} of {name}")
            row = base | {"provider": name, "rival": provider.rival, "graph": provider.graph}
            run = Run(name, lambda: None, provider.benchmark, provider.own_thread, pass_name == "training")
            try:
                plans = providers.plans(name, work)
                row["family"] = ",".join(plan.family for plan in plans.values())
                with spent("making " + name):
                    function = measure.call(run, partial(provider.make, work))
                if function is None:
                    continue
                run.function = function
                if gpu and not case.problem:
                    self.poison(pass_name)
                with spent("first call of " + name):
                    results = measure.call(run)
                with spent("judging"):
                    plan = plans.get("backward_weight")
                    left = plan is not None and plan.family == "aten" and not plan.arranged
                    error, wrong = self.judge(provider, pass_name, results, left)
                row["max_err"], row["rms_err"] = (e if math.isfinite(e) else None for e in error)
                del results
                row["status"], row["note"] = ("wrong", wrong) if wrong else ("ok" if gpu else "checked", "")
                if not wrong:
                    runs.append(run)
            except Exception as raised:
                row["status"], row["note"] = failure(raised)
            rows[name] = row
        if gpu and runs:
            say(doing=f"timing {pass_name}")
            try:
                with spent("timing"):
                    self.time(runs, rows, flops, nbytes, roof)
            except Exception as error:
                for run in runs:
                    rows[run.name]["status"], rows[run.name]["note"] = failure(error)
        return list(rows.values())

    def time(self, runs: list[Run], rows: dict, flops: int, nbytes: int, roof) -> None:
        fits = nbytes <= measure.l2_bytes()
        limits = self.request["budget"], self.request["fewest"], self.request["most"]
        figures = measure.interleave(runs, *limits, measure.flush_buffer() if fits else None)
        for name, figure in figures.items():
            ms = figure["ms"]
            rows[name].update(figure, tflops=flops / ms / 1e9, gbps=nbytes / ms / 1e6, roof_share=roof / ms)
            rows[name]["cold_l2"] = fits

    def poison(self, pass_name: str) -> None:
        """NaN where the pass's result (of a training step, the output) is likely to be allocated."""
        layer = self.case.layer
        shapes = {"backward_input": layer.input_shape, "backward_weight": layer.weight_shape}
        shape = shapes.get(pass_name, layer.output_shape)
        last = self.task["memory_format"] == "channels_last"
        form = providers.LAST.get(len(shape)) if last else None
        measure.poison(shape, self.dtype, form or torch.contiguous_format)


COLUMNS = (
    *("suite", "case", "pass", "dtype", "precision", "memory_format", "provider", "ms", "ms_spread", "tflops", "gbps"),
    *(
        "roof_ms",
        "roof_share",
        "reach_ms",
        "max_err",
        "rms_err",
        "status",
        "note",
        "family",
        "host_us",
        "rounds",
        "cold_l2",
    ),
    *("flops", "bytes", "rival", "graph", "classes", "layer", "checked_as"),
)


def base_row(task: dict, case: cases.Case) -> dict:
    """A row that says nothing yet but which case it is about."""
    row: dict = dict.fromkeys(COLUMNS)
    row.update(suite=task["suite"], case=task["name"], precision=task["precision"], memory_format=task["memory_format"])
    row["dtype"] = str(check.dtype_of(task["precision"])).removeprefix("torch.")
    row.update(classes=list(cases.classes(case.layer)), layer=case.description, status="", note="", provider="")
    row["pass"] = ""
    return row


def failure(error: Exception) -> tuple[str, str]:
    """Status and note of a row whose provider raised; raises again what has left the device unusable."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
    if torch.cuda.is_available() and not isinstance(error, torch.OutOfMemoryError):
        torch.cuda.synchronize()  # raises where the context is lost
    if isinstance(error, torch.OutOfMemoryError):
        del error
        gc.collect()
        torch.cuda.empty_cache()
        return "skipped", "the GPU's memory is too small: " + text
    return "error", text


def shrunk(case: cases.Case) -> cases.Case:
    """The case as the interpreter can check it."""
    return replace(case, layers=tuple(cases.shrink(layer) for layer in case.layers))


def run_task(request: dict, task: dict, say, kept: dict) -> None:
    """All rows of one task.  `kept` holds the last Truth, which tasks of one case share."""
    case = cases.find(task["suite"], task["name"])
    gpu = request["gpu"]
    if not gpu and case.problem:
        say(row=base_row(task, case) | {"status": "skipped", "note": "whole problems are checked on a GPU alone"})
        return
    original, case = case, case if gpu else shrunk(case)
    kind = "half" if check.dtype_of(task["precision"]).itemsize == 2 else "fp32"
    key = task["suite"], task["name"], kind
    if kept.get("key") != key:
        kept.clear()
        gc.collect()
        if gpu and (free := measure.free_bytes()) < case.check_bytes:
            need = f"the fp64 check needs about {case.check_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            say(row=base_row(task, case) | {"status": "skipped", "note": f"the GPU's memory is too small: {need}"})
            return
        torch.manual_seed(0)
        try:
            kept.update(key=key, truth=Truth(case, kind, "cuda" if gpu else "cpu"))
        except Exception as error:
            status, note = failure(error)
            say(row=base_row(task, case) | {"status": status, "note": note})
            return
    try:
        work = Task(request, task, kept["truth"])
        for pass_name in task["passes"]:
            for row in work.rows(pass_name, say):
                if not gpu:  # of a shrunken layer only errors are told, under the case's own name
                    own = base_row(task, original)
                    row |= {"layer": own["layer"], "classes": own["classes"], "flops": None, "bytes": None}
                    row["checked_as"] = case.description
                say(row=row)
    except Exception as error:
        kept.clear()
        status, note = failure(error)
        say(row=base_row(task, case) | {"status": status, "note": note})
