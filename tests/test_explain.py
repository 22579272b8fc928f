"""explain(): the reasons are the ones that acted, in words and as data."""

import os
import subprocess
import sys

import pytest
import torch
from samples import OURS, TCONV, each, sample
from torch import nn

import tconv
from tconv import dispatch, ops
from tconv.problem import PASSES

KERNELS = {"few", "gemm", "direct"}


def families(explanation):
    return {p.plan.family for p in explanation.passes}


def reasons(explanation):
    return {p.plan.reason for p in explanation.passes}


@each()
def test_call(sample, device):
    """Data and text of a call that tconv takes."""
    tensors = sample.tensors(device)
    told = tconv.explain(*tensors, **sample.layer)
    assert tuple(p.name for p in told.passes) == PASSES
    assert families(told) <= ({"few", "direct"} if "depthwise" in sample.id else {"few", "gemm"})
    assert told.input_shape == sample.input
    assert told.dtype is torch.float32
    assert told.geometry.kernel == sample.weight[2:]
    output = told.geometry.output_size(sample.input[2:])
    for axis, kernel, stride, length in zip(told.phases, sample.weight[2:], told.geometry.stride, output, strict=True):
        assert len(axis) == min(stride, length)  # a phase beyond the output has no outputs
        taps = sorted(tap for phase in axis for tap, _ in phase)
        assert taps == list(range(kernel)) or length < stride
    lines = str(told).splitlines()
    assert lines[0].startswith(f"conv_transpose{sample.ndim}d {sample.input[1]} to ")
    assert lines[1].startswith("  phases: ")
    assert [line.split(":")[0].strip() for line in lines[2:]] == list(PASSES)
    assert all(" tile " in line for line in lines[2:])


def test_nothing_runs(device, monkeypatch):
    monkeypatch.setattr(ops, "conv_transpose", lambda *_: pytest.fail("the layer ran"))
    case = sample("2d")
    assert families(tconv.explain(*case.tensors(device), **case.layer)) <= KERNELS


def test_the_plan_told_is_the_plan_taken(device, monkeypatch):
    case = sample("1d_grouped")
    tensors = case.tensors(device)
    taken, plan = [], dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda *a: (taken.append(plan(*a)), taken[-1])[1])
    output = case.ours(*tensors, **case.layer)
    output.backward(torch.randn_like(output))
    ran = set(taken)
    assert {p.plan for p in tconv.explain(*tensors, **case.layer).passes} == ran


def test_unbatched_and_tuples(device):
    x, w = torch.randn(3, 4, device=device), torch.randn(3, 2, 2, device=device)
    told = tconv.explain(x, w, None, (2,), padding=[1])
    assert told.input_shape == (3, 4)
    assert told.geometry.stride == (2,)
    assert families(told) == {"few", "gemm"} if device == "cpu" else families(told) <= {"gemm", "aten"}


def test_phases_without_taps_are_told(device):
    x, w = torch.randn(1, 2, 4, device=device), torch.randn(2, 2, 1, device=device)
    assert "phases: 3 (2 of 0 taps, 1 of 1 tap)" in str(tconv.explain(x, w, stride=3))


class Odd(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


REFUSED = {
    "complex": (lambda t: t.to(torch.complex64), "complex64 runs aten"),
    "int": (lambda t: t.to(torch.int32), "int32 runs aten"),
    "meta": (lambda t: t.to("meta"), "meta tensors have no kernels"),
    "subclass": (lambda t: t.as_subclass(Odd), "Odd is a tensor subclass with rules of its own"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_calls(why, device):
    change, reason = REFUSED[why]
    case = sample("2d")
    told = tconv.explain(*map(change, case.tensors(device, requires_grad=False)), **case.layer)
    assert families(told) == {"aten"}
    assert reasons(told) == {reason}
    assert str(told).count(f"aten, because {reason}") == 3


def test_autocast_is_seen(device):
    case = sample("2d")
    with torch.autocast(device, torch.bfloat16):
        told = tconv.explain(*case.tensors(device), **case.layer)
    assert told.dtype is torch.bfloat16
    assert families(told) <= KERNELS


def test_bad_calls_raise_as_the_layer_does(device):
    x, w = torch.randn(1, 3, 4, device=device), torch.randn(3, 2, 2, device=device)
    for bad in (dict(stride=0), dict(padding=9), dict(groups=2), dict(bias=torch.randn(5, device=device))):
        with pytest.raises(RuntimeError) as expected:
            TCONV[1](x, w, **bad)
        with pytest.raises(RuntimeError) as told:
            tconv.explain(x, w, **bad)
        assert str(told.value) == str(expected.value)
    for bad in (dict(stride=1.0), dict(groups=True)):
        with pytest.raises(TypeError, match=next(iter(bad))):
            tconv.explain(x, w, **bad)
    with pytest.raises(RuntimeError, match="weight of 3 to 5 dimensions"):
        tconv.explain(x, w[0])


# Models.

UNCONVERTED = "not converted, and outside tconv.override()"


class Model(nn.Module):
    """A converted layer, called twice; one that is not; a functional call; one under override; an empty block."""

    def __init__(self):
        super().__init__()
        self.ours = nn.Sequential(nn.Sequential(), OURS[1](2, 2, 3, padding=1))
        self.torchs = nn.ConvTranspose1d(2, 2, 3, padding=1)

    def forward(self, x):
        x = self.torchs(self.ours(self.ours(x)))
        x = torch.nn.functional.conv_transpose1d(x, self.torchs.weight, padding=1)
        with tconv.override():
            return self.torchs(x)


def test_model(device):
    model = Model().to(device)
    told = tconv.explain(model, torch.randn(1, 2, 5, device=device))
    assert [layer.module for layer in told.layers] == ["ours.1", "ours.1", "torchs", "", "torchs"]
    expected = [True, True, False, False, True]
    for layer, on_kernels in zip(told.layers, expected, strict=True):
        assert families(layer) <= (KERNELS if on_kernels else {"aten"})
        assert (reasons(layer) == {UNCONVERTED}) == (not on_kernels)
    assert str(told) == "\n".join(map(str, told.layers))
    assert "ours.1: conv_transpose1d 2 to 2 k3 p1, input 1x2x5 float32" in str(told)
    assert (
        f"torchs: conv_transpose1d 2 to 2 k3 p1, input 1x2x5 float32\n  phases: 1 (3 taps)\n  forward: aten, because {UNCONVERTED}"
        in str(told)
    )


def test_model_after_convert_and_under_override(device):
    model, x = nn.Sequential(nn.ConvTranspose1d(2, 2, 3), nn.ReLU()).to(device), torch.randn(1, 2, 5, device=device)
    assert reasons(tconv.explain(model, x).layers[0]) == {UNCONVERTED}
    with tconv.override():
        assert families(tconv.explain(model, x).layers[0]) <= KERNELS
    tconv.convert(model)
    assert families(tconv.explain(model, x).layers[0]) <= KERNELS
    tconv.revert(model)
    assert reasons(tconv.explain(model, x).layers[0]) == {UNCONVERTED}


@pytest.mark.parametrize("overrides", (0, 1, 2))
def test_a_refused_layer_is_told_once(overrides, device):
    """The call that falls to aten passes through every override around it."""
    model = nn.ConvTranspose1d(2, 2, 3, dtype=torch.complex64, device=device)
    x = torch.randn(1, 2, 5, dtype=torch.complex64, device=device)
    if overrides == 0:
        tconv.convert(model)
        told = tconv.explain(model, x)
    elif overrides == 1:
        with tconv.override():
            told = tconv.explain(model, x)
    else:
        with tconv.override(), tconv.override():
            told = tconv.explain(model, x)
    assert [reasons(layer) for layer in told.layers] == [{"complex64 runs aten"}]


def test_model_on_meta():
    model = nn.Sequential(OURS[1](2, 2, 3), nn.ConvTranspose1d(2, 2, 3)).to("meta")
    told = tconv.explain(model, torch.randn(1, 2, 5, device="meta"))
    assert [reasons(layer) for layer in told.layers] == [{"meta tensors have no kernels"}, {UNCONVERTED}]


def test_arguments_of_the_model(device):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = OURS[1](2, 3, 3, stride=2)

        def forward(self, a, *, size):
            return self.up(a, output_size=size)

    told = tconv.explain(Two().to(device), torch.randn(1, 2, 4, device=device), size=[10])
    assert told.layers[0].geometry.output_padding == (1,)
    assert told.layers[0].module == "up"


def test_nothing_to_explain(device):
    told = tconv.explain(nn.Conv1d(2, 2, 3, device=device), torch.randn(1, 2, 5, device=device))
    assert told.layers == ()
    assert str(told) == "no transposed convolution ran"


def test_a_model_that_fails_is_left_as_it_was(device):
    class Failing(Model):
        def forward(self, x):
            super().forward(x)
            raise ValueError("enough")

    model = Failing().to(device)
    with pytest.raises(ValueError, match="enough"):
        tconv.explain(model, torch.randn(1, 2, 5, device=device))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not tconv.functional.observers
    output = model.torchs(torch.randn(1, 2, 5, device=device))
    assert "tconv" not in output.grad_fn.name()


# Without Triton's interpreter, in a process of its own.

PLAIN_CPU = """
import torch, tconv
from torch import nn
x = torch.randn(1, 2, 4, requires_grad=True)
layer = tconv.ConvTranspose1d(2, 3, 3, stride=2)
expected = torch.conv_transpose1d(x, layer.weight, layer.bias, 2)
assert torch.equal(layer(x), expected)
assert "tconv" not in layer(x).grad_fn.name()
assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (layer(x), expected)))
with tconv.override():
    assert torch.equal(torch.conv_transpose1d(x, layer.weight, layer.bias, 2), expected)
told = tconv.explain(x, layer.weight, stride=2)
assert {p.plan.reason for p in told.passes} == {"CPU tensors run aten"}, told
told = tconv.explain(nn.Sequential(layer, nn.ConvTranspose1d(3, 1, 1)), x)
assert [p.plan.reason for l in told.layers for p in l.passes] == (
    3 * ["CPU tensors run aten"] + 3 * ["not converted, and outside tconv.override()"]
), told
import sys
assert "triton" not in sys.modules, "Triton is imported at the first launch"
print(told)
"""


def test_cpu_tensors_run_aten():
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PLAIN_CPU], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "forward: aten, because CPU tensors run aten" in done.stdout
