"""The patch kernel: which weights' gradients it takes, with which tile, and that these are the gradients."""

import random

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, passes
from test_aot import layer
from test_passes import LAST, TCONV

import tconv
from tconv import dispatch, patches
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.problem import PASSES, Problem

HOPPER = Target("cuda", 90, 132)
ID = dict(ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "")


def drawn(seed):
    """A random layer of few output channels and its tensors in float64, or None where it has no output."""
    draw = random.Random(seed)
    ndim = draw.choice((1, 2, 2, 3))
    c_in, c_out = draw.choice(((32, 1), (40, 3), (70, 2), (300, 2)))
    most = (16, 4, 2)[ndim - 1]
    kernel = [draw.randint(1, most) for _ in range(ndim - 1)] + [draw.randint(2, most)]
    stride = [draw.randint(1, 3) for _ in range(ndim)]
    dilation = [draw.choice((1, 1, 2)) for _ in range(ndim)]
    padding = [draw.randint(0, 2) for _ in range(ndim)]
    output_padding = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    size = [draw.randint(1, 3) for _ in range(ndim - 1)] + [draw.randint(1, 20)]
    geometry = Geometry(*map(tuple, (kernel, stride, padding, output_padding)), 1, tuple(dilation))
    if min(geometry.output_size(size)) < 1:
        return None
    torch.manual_seed(seed)
    shapes = (2, c_in, *size), (c_in, c_out, *kernel), (2, c_out, *geometry.output_size(size))
    input, weight, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    if ndim > 1 and draw.random() < 0.4:
        input = input.contiguous(memory_format=LAST[input.ndim])
    if ndim > 1 and draw.random() < 0.4:
        grad = grad.contiguous(memory_format=LAST[input.ndim])
    if draw.random() < 0.3:
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    options = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation)
    return (input, weight, None, grad), options


@pytest.fixture
def always(monkeypatch):
    """The kernel takes every such gradient, also where a GPU would not be filled."""
    for name in ("LEAST_PIXELS", "LEAST_WIDTH"):
        monkeypatch.setattr(patches, name, {True: 0, False: 0})
    for name in ("FEW_COLUMNS", "FEW_COLUMNS_LAST"):
        monkeypatch.setattr(patches, name, patches.MOST_COLUMNS)
    monkeypatch.setattr(patches, "FEW_OUT_LAST", patches.FEW_OUT)
    dispatch.plan.cache_clear()
    with dispatch.without("few", "columns", "long", "aten"):
        yield
    dispatch.plan.cache_clear()


@pytest.mark.parametrize("precision", ("float64", "tf32", "bfloat16"))
@pytest.mark.parametrize("seed", range(30))
def test_random_layers(seed, precision, device, always):
    """Against the oracle, the same bits every time."""
    if (layer := drawn(seed)) is None:
        pytest.skip("no output")
    if precision == "float64" and device != "cpu":
        pytest.skip("no kernels there")
    if precision != "float64" and device == "cpu" and seed > 5:
        pytest.skip("the interpreter is slow")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = getattr(torch, precision, torch.float32)
    tensors, options = layer
    tensors = [None if t is None else t.to(device, dtype) for t in tensors]
    ndim = tensors[0].ndim - 2
    plan = tconv.explain(*tensors[:3], **options).passes[2].plan
    actual, again = (passes(TCONV[ndim], *tensors, **options)[2] for _ in range(2))
    if device != "cpu" and plan.precision == "ieee":
        pytest.skip("sums so short have no tensor core to go to")
    assert plan.family == "patches" and plan.precision != "tf32", plan
    exact = passes(ATEN[ndim], *(None if t is None else t.double() for t in tensors), **options)[2]
    bound = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-3}[dtype]
    assert errors(actual, exact)[1] < bound
    assert torch.equal(actual, again)


def test_infinities_beyond_a_row(device, always, ieee):
    """What a tile's pixels beyond the row's end would read is no part of any sum."""
    x, w = torch.randn(1, 32, 3, device=device), torch.randn(32, 3, 2, device=device)
    grad = torch.randn(1, 3, 4, device=device)
    grad[..., 3] = torch.inf  # the last pixel's last tap alone
    if device == "cpu":
        assert tconv.explain(x, w).passes[2].plan.family == "patches"
    of_weight = passes(TCONV[1], x, w, None, grad)[2]
    assert of_weight[..., 0].isfinite().all() and not of_weight[..., 1].isfinite().any()


@pytest.mark.parametrize(
    "args, options, dtype, tf32, last, taken",
    [
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), torch.float32, True, False, True),
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), torch.float32, False, False, True),
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), torch.float32, True, True, False),
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), torch.bfloat16, True, True, True),
        ((529, 2, 4, (6, 7), 8), dict(stride=2, padding=1), torch.float32, True, True, True),
        ((529, 2, 4, (6, 7), 8), dict(stride=2, padding=1), torch.bfloat16, True, True, False),  # too few pixels
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3), torch.float16, True, False, True),
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3), torch.float32, True, False, False),
        ((128, 3, 5, (128, 128), 16), dict(stride=2, padding=2), torch.float16, True, False, False),
        ((90, 5, 4, (272, 480), 1), dict(stride=2, padding=1), torch.bfloat16, True, False, False),
        ((64, 3, 1, (32, 32), 64), {}, torch.bfloat16, True, False, False),
        ((16, 3, 4, (32, 32), 64), dict(stride=2), torch.bfloat16, True, False, False),
    ],
    **ID,
)
def test_which(args, options, dtype, tf32, last, taken):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    source, destination = ("channels", "channels") if last else ("width", "width")
    for direction in PASSES:
        facts = geometry, batch, c_in, c_out, size, dtype, tf32, source, destination
        plan = dispatch.plan(Problem(direction, *facts), HOPPER)
        assert (plan.family == "patches") == (taken and direction == "backward_weight"), plan
        if plan.family == "patches":
            assert plan.precision == ("half" if dtype.itemsize == 2 else "tf32x3")
            assert "one product" in plan.reason and "columns" in plan.config.describe()


def at_full_size(layer, dtype, last):
    """Random (input, weight, grad_output) of a layer, as test_aot.layer has it, on the GPU."""
    batch, c_in, c_out, size, geometry = layer
    if last and geometry.ndim == 1:
        pytest.skip("torch has no channels_last in 1-d")
    shapes = (batch, c_in, *size), (c_in, c_out, *geometry.kernel), (batch, c_out, *geometry.output_size(size))
    x, w, grad = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    if last:
        x, grad = (t.contiguous(memory_format=LAST[t.ndim]) for t in (x, grad))
    return x, w, grad


@pytest.mark.gpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize(
    "args, options",
    [
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1)),
        ((64, 1, 2, (125, 130), 8), dict(stride=2)),
        ((597, 2, 4, (48, 56), 4), dict(stride=2, padding=1)),
        ((529, 2, 4, (6, 7), 8), dict(stride=2, padding=1)),
        ((56, 1, 9, (135, 240), 1), dict(stride=4, padding=4, output_padding=3)),
        ((512, 1, 16, (3999,), 4), dict(stride=8)),
        ((64, 1, 3, (9, 30, 31), 2), dict(stride=2, padding=1)),
    ],
    **ID,
)
def test_on_a_gpu(args, options, precision, last, always):
    """At full size, no worse than torch; the same bits every time."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    x, w, grad = at_full_size(layer(*args, **options), getattr(torch, precision, torch.float32), last)
    n = x.ndim - 2
    plan = tconv.explain(x, w, **options).passes[2].plan
    assert plan.family == "patches", plan
    actual, again = (passes(TCONV[n], x, w, None, grad, **options)[2] for _ in range(2))
    exact = passes(ATEN[n], x.double(), w.double(), None, grad.double(), **options)[2]
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    peer = passes(ATEN[n], x, w, None, grad, **options)[2]
    assert_no_worse(actual, exact, peer, str(plan))
    assert torch.equal(actual, again)
