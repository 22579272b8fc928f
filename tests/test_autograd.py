"""Gradients of the first and second order, and the operators' contract with torch."""

import itertools

import pytest
import torch
from samples import NAMES, Sample, assert_near, each, sample

from tconv import launch
from tconv.dispatch import INTERPRET

# gradcheck needs float64, which reaches the kernels in the interpreter alone (on CUDA it runs aten).
interpreted = pytest.mark.skipif(not INTERPRET, reason="float64 runs on the kernels in the interpreter alone")

SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(NAMES, n)]
PASS_OF = dict(zip(NAMES, ("backward_input", "backward_weight", "backward_bias"), strict=True))


def grads_of(function, case, tensors, grad_output):
    return torch.autograd.grad(function(*tensors, **case.layer), tensors, grad_output)


def output_like(case, tensors):
    return torch.randn_like(case.aten(*tensors, **case.layer))


@pytest.mark.parametrize("wanted", SUBSETS, ids="_".join)
def test_any_subset_of_gradients(wanted, device, monkeypatch):
    """Just the gradients asked for, each as it is when all are asked for, and no work for the others."""
    case = sample("2d")
    tensors = case.tensors(device)
    grad_output = output_like(case, tensors).detach()
    full = dict(zip(NAMES, grads_of(case.ours, case, tensors, grad_output), strict=True))

    ran = set()
    for name in PASS_OF.values():
        original = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, name=name, f=original: (ran.add(name), f(*a))[1])
    leaves = [t.detach().requires_grad_(n in wanted) for n, t in zip(NAMES, tensors, strict=True)]
    case.ours(*leaves, **case.layer).backward(grad_output)
    for name, leaf in zip(NAMES, leaves, strict=True):
        if name in wanted:
            assert torch.equal(leaf.grad, full[name])
        else:
            assert leaf.grad is None
    assert ran == {PASS_OF[n] for n in wanted}


def test_no_gradient_wanted(device):
    case = sample("1d")
    output = case.ours(*case.tensors(device, requires_grad=False), **case.layer)
    assert not output.requires_grad
    assert output.grad_fn is None


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_modes_without_gradients(mode, device):
    case = sample("1d_grouped")
    tensors = case.tensors(device)
    with mode():
        output = case.ours(*tensors, **case.layer)
    assert not output.requires_grad
    assert output.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(output, case.ours(*tensors, **case.layer))


def test_inference_tensors_cannot_be_saved_for_backward(device):
    """As torch: an inference tensor serves where nothing is saved, and raises where it would be."""
    case = sample("1d")
    x, w, b = case.tensors(device, requires_grad=False)
    with torch.inference_mode():
        x = x.clone()
    for function in (case.ours, case.aten):
        assert function(x, w, b, **case.layer).shape[:2] == (2, 2)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(x, w.requires_grad_(), b, **case.layer)
        w.requires_grad_(False)


@pytest.mark.parametrize("reduction", ("sum", "expanded_row", "transposed"))
@each([sample("1d"), sample("2d"), sample("2d_depthwise")])
def test_grad_output_of_any_strides(sample, reduction, device, ieee):
    """sum() sends back one element, expanded with strides of 0."""
    tensors = sample.tensors(device)
    like = output_like(sample, tensors)
    if reduction == "sum":
        grad_output = torch.ones((), device=device).expand_as(like)
    elif reduction == "expanded_row":
        grad_output = torch.randn(like.shape[1:], device=device).expand_as(like)
    else:
        grad_output = torch.randn(like.shape[::-1], device=device).permute(*reversed(range(like.ndim)))
    ours, torchs = (grads_of(f, sample, tensors, grad_output) for f in (sample.ours, sample.aten))
    for a, b in zip(ours, torchs, strict=True):
        assert_near(a, b)


@each()
def test_second_order_equals_torch(sample, device, ieee):
    """Gradients of every first gradient with respect to every tensor, the output's gradient included."""
    tensors = sample.tensors(device)
    grad_output = output_like(sample, tensors).requires_grad_()
    cotangents = [torch.randn_like(t) for t in tensors]

    def second(function):
        first = torch.autograd.grad(function(*tensors, **sample.layer), tensors, grad_output, create_graph=True)
        # Not with respect to the bias: no first gradient of a linear layer depends on it.
        return torch.autograd.grad(first, (*tensors[:2], grad_output), cotangents)

    for a, b in zip(second(sample.ours), second(sample.aten), strict=True):
        assert_near(a, b)


def test_double_backward_through_the_bias(device, ieee):
    """d grad_bias / d grad_output is a broadcast; it is reached when the loss is not linear in the output."""
    case = sample("2d")
    tensors = case.tensors(device)

    def second(function):
        loss = function(*tensors, **case.layer).pow(3).sum()
        (grad_bias,) = torch.autograd.grad(loss, tensors[2], create_graph=True)
        return torch.autograd.grad(grad_bias.square().sum(), tensors)

    for a, b in zip(second(case.ours), second(case.aten), strict=True):
        assert_near(a, b)


def test_third_order_equals_torch(device, ieee):
    case = Sample("small", (1, 2, 3), (2, 1, 2), dict(stride=2))
    tensors = case.tensors(device)

    def third(function):
        value = function(*tensors, **case.layer).pow(4).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, tensors, create_graph=True)
            value = sum(g.sum() for g in grads)
        return grads

    for a, b in zip(third(case.ours), third(case.aten), strict=True):
        assert_near(a, b)


@interpreted
def test_gradcheck_every_element(device):
    case = Sample("small", (1, 2, 2), (2, 1, 2), dict(stride=2, padding=1, output_padding=1))
    tensors = case.tensors(device, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: case.ours(*t, **case.layer), tensors)


@interpreted
@each()
def test_gradcheck(sample, device):
    tensors = sample.tensors(device, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: sample.ours(*t, **sample.layer), tensors, fast_mode=True)


@interpreted
@each([sample("1d"), sample("1d_grouped"), sample("2d_depthwise"), sample("1d_dilated")])
def test_gradgradcheck(sample, device):
    tensors = sample.tensors(device, torch.float64)
    assert torch.autograd.gradgradcheck(lambda *t: sample.ours(*t, **sample.layer), tensors, fast_mode=True)


def test_non_leaf_and_views(device, ieee):
    """Gradients flow through whatever made the operands."""
    case = sample("2d")
    base = case.tensors(device)

    def run(function):
        x, w, b = base
        x = x.transpose(2, 3).contiguous().transpose(2, 3) * 2
        return torch.autograd.grad(function(x, w.flip(0), b + 1, **case.layer).sin().sum(), base)

    for a, b in zip(run(case.ours), run(case.aten), strict=True):
        assert_near(a, b)


def test_changing_a_saved_tensor_in_place_is_noticed(device):
    case = sample("1d")
    x, w, b = case.tensors(device)
    output = case.ours(x, w, b, **case.layer)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


OPERATORS = ("conv_transpose", "backward_input", "backward_weight", "backward_bias")


def operator_arguments(operator, case, x, w, b):
    grad = torch.randn_like(case.aten(x, w, b, **case.layer)).requires_grad_()
    return {
        "conv_transpose": (x, w, b, *case.arguments()),
        "backward_input": (grad, w, list(x.shape[2:]), *case.arguments()),
        "backward_weight": (grad, x, list(w.shape[2:]), *case.arguments()),
        "backward_bias": (grad,),
    }[operator]


@pytest.mark.parametrize("operator", OPERATORS)
@each([sample("1d"), sample("1d_grouped"), sample("2d_depthwise"), sample("3d")])
def test_opcheck(sample, operator, device, ieee):
    """Schema, fake tensors, autograd registration and AOT dispatch with symbolic sizes, by torch's own checker."""
    arguments = operator_arguments(operator, sample, *sample.tensors(device))
    torch.library.opcheck(getattr(torch.ops.tconv, operator).default, arguments)


def channels_last(x, w, b):
    return x.detach().to(memory_format=torch.channels_last).requires_grad_(), w, b


def half(*tensors):
    return [t.detach().half().requires_grad_() for t in tensors]


KINDS = {
    "channels_last": channels_last,
    "channels_last_weight": lambda x, w, b: (x, *channels_last(w, None, b)[:1], b),
    "half": half,
    "empty_batch": lambda x, w, b: (x.detach()[:0].requires_grad_(), w, b),
    "no_bias": lambda x, w, b: (x, w, None),
}


@pytest.mark.parametrize("operator", OPERATORS[:3])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_of_other_tensors(kind, operator, device):
    """Fake results have the strides of the real ones."""
    case = sample("2d")
    arguments = operator_arguments(operator, case, *KINDS[kind](*case.tensors(device)))
    tolerance = dict(rtol=1e-2, atol=1e-2) if kind == "half" else {}
    torch.library.opcheck(getattr(torch.ops.tconv, operator).default, arguments, **tolerance)
