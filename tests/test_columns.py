"""The column kernels: that they make the convolution, which problems they take, and with which tile."""

import random
from dataclasses import replace
from math import prod

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, oracle
from test_aot import layer
from test_passes import LAST, TCONV

import tconv
from tconv import columns, dispatch
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.problem import Problem

HOPPER = Target("cuda", 90, 132)


@pytest.fixture
def always(monkeypatch):
    """always(splits): let the kernels take every layer that is no direct one, and cut its sums into so many parts."""
    choose = columns.choose

    def take(splits=1):
        for name, value in dict(LEAST_CHANNELS=1, LEAST_WEIGHT=0, LESS=float("inf")).items():
            monkeypatch.setattr(columns, name, value)
        monkeypatch.setattr(columns, "choose", lambda *args: (choose(*args)[0], splits, 0.0))
        dispatch.plan.cache_clear()

    yield take
    dispatch.plan.cache_clear()


def drawn(seed):
    """A random layer and its tensors in float64, or None where it has no output."""
    draw = random.Random(seed)
    ndim, groups = draw.choice((1, 2, 2, 3)), draw.choice((1, 1, 2))
    c_in, c_out = draw.choice(((6, 7), (40, 5), (16, 16), (70, 2)))
    most = (16, 5, 3)[ndim - 1]
    kernel = [draw.randint(1, most) for _ in range(ndim)]
    stride = [draw.randint(1, 4) for _ in range(ndim)]
    dilation = [draw.choice((1, 1, 2, 3)) for _ in range(ndim)]
    padding = [draw.randint(0, 2) for _ in range(ndim)]
    output_padding = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    size = [draw.randint(1, 5 - ndim) for _ in range(ndim)]
    geometry = Geometry(*map(tuple, (kernel, stride, padding, output_padding)), groups, tuple(dilation))
    if min(geometry.output_size(size)) < 1:
        return None
    torch.manual_seed(seed)
    x = torch.randn(draw.choice((1, 3)), c_in * groups, *size, dtype=torch.float64)
    weight = torch.randn(c_in * groups, c_out, *kernel, dtype=torch.float64)
    if draw.random() < 0.3:  # channels_last
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    if ndim > 1 and draw.random() < 0.5:
        x = x.contiguous(memory_format=LAST[x.ndim])
    bias = torch.randn(c_out * groups, dtype=torch.float64) if draw.random() < 0.5 else None
    options = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups, dilation=dilation)
    return x, weight, bias, options


@pytest.mark.parametrize("seed", range(40))
def test_random_layers(seed, device, always, ieee):
    if (layer := drawn(seed)) is None:
        pytest.skip("no output")
    x, w, b, options = layer
    always(splits=1 << seed % 3)
    expected = ATEN[x.ndim - 2](x, w, b, **options)
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, w, b = (None if t is None else t.to(device, dtype) for t in (x, w, b))
    plan = dispatch_of(x, w, b, options)
    assert plan.family in ("columns", "few"), plan
    actual = TCONV[x.ndim - 2](x, w, b, **options)
    assert errors(actual.cpu(), expected)[1] < (1e-13 if device == "cpu" else 3e-7)
    assert torch.equal(actual, TCONV[x.ndim - 2](x, w, b, **options))


def dispatch_of(x, w, b, options):
    return tconv.explain(x, w, b, **options).passes[0].plan


@pytest.mark.parametrize("splits", (1, 4))
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize(
    "shape, weight, options",
    [
        ((3, 160, 1, 1), (160, 12, 4, 4), {}),
        ((1, 160, 2, 2), (160, 16, 4, 4), dict(stride=2, padding=1)),
        ((1, 140, 3), (140, 33, 16), dict(stride=8, padding=4)),
        ((2, 260, 2, 2, 2), (260, 34, 2, 2, 2), dict(stride=2, groups=2)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_precisions(shape, weight, options, precision, splits, device, always):
    dtype = getattr(torch, precision, torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    always(splits)
    n = len(shape) - 2
    x, w = (torch.randn(s, dtype=torch.float64, device=device).to(dtype) for s in (shape, weight))
    b = torch.randn(weight[1] * options.get("groups", 1), device=device).to(dtype)
    plan = dispatch_of(x, w, b, options)
    assert (plan.family, plan.splits) == ("columns", splits), plan
    actual = TCONV[n](x, w, b, **options)
    exact = ATEN[n](x.double(), w.double(), b.double(), **options)
    if plan.precision == "tf32":
        grad = torch.zeros_like(actual)
        assert errors(actual, oracle(n, x, w, b, grad, tf32=True, **options)[0])[1] < 4e-6
    else:
        assert_no_worse(actual, exact, ATEN[n](x, w, b, **options), str(plan))
        with dispatch.without("columns", "aten"):
            other = TCONV[n](x, w, b, **options)
        assert errors(actual, exact)[1] <= 1.25 * errors(other, exact)[1]  # of a few hundred elements: some is chance
    assert torch.equal(actual, TCONV[n](x, w, b, **options))
    assert actual.stride() == ATEN[n](x, w, b, **options).stride()


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("where", ("input", "weight"))
@pytest.mark.parametrize("precision", ("float32", "float16"))
def test_nan_and_inf_go_where_torch_sends_them(where, value, precision, device, always, ieee):
    """Also those of a weight, since each output sums the products of its own taps alone."""
    always(splits=2)
    x, w = torch.randn(2, 70, 3, 2), torch.randn(70, 9, 4, 3)
    (x if where == "input" else w)[1, 5, 0, 1] = value
    x, w = (t.to(device, getattr(torch, precision)) for t in (x, w))
    options = dict(stride=2, padding=1)
    assert dispatch_of(x, w, None, options).family == "columns"
    actual, expected = tconv.conv_transpose2d(x, w, **options), ATEN[2](x.double(), w.double(), **options)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_unreached_outputs_are_the_bias(device, always):
    """stride 4, dilation 2: odd outputs have no tap."""
    always()
    x, w, bias = (torch.randn(s, device=device) for s in ((2, 20, 5), (20, 24, 3), (24,)))
    y = tconv.conv_transpose1d(x, w, bias, stride=4, dilation=2)
    assert dispatch_of(x, w, bias, dict(stride=4, dilation=2)).family == "columns"
    assert torch.equal(y[:, :, 1::2], bias[None, :, None].expand_as(y[:, :, 1::2]))


# (layer's arguments, options): where reading the weight is nearly all.
WEIGHTS = [
    ((100, 512, 4, (1, 1), 64), {}),
    ((1024, 512, 4, (2, 2), 1), dict(stride=2, padding=1)),
    ((512, 512, 4, (4, 4), 1), dict(stride=2, padding=1)),
    ((512, 512, 4, (1, 1), 1), dict(stride=2, padding=1)),
    ((1536, 768, 16, (1,), 1), dict(stride=8)),
    ((1536, 768, 16, (4,), 1), dict(stride=8)),
    ((512, 256, 2, (8, 8), 1), dict(stride=2)),
]


def planned(args, dtype=torch.float32, tf32=True, target=HOPPER, source="width", **options):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    return dispatch.plan(Problem("forward", geometry, batch, c_in, c_out, size, dtype, tf32, source), target)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("args, options", WEIGHTS, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "")
def test_which(args, options, dtype):
    plan = planned(args, dtype, **options)
    assert plan.family == "columns", plan
    tile = plan.config
    shared = tile.num_stages * (tile.columns + tile.pixels) * tile.channels * dtype.itemsize
    assert shared <= 96 * 1024
    assert "columns x" in tile.describe()


@pytest.mark.parametrize(
    "args, options, dtype, last, family",
    [
        ((320, 320, 2, (4, 4, 4), 2), dict(stride=2), torch.float32, True, "shift"),
        ((320, 320, 2, (4, 4, 4), 2), dict(stride=2), torch.float16, True, "shift"),
        ((1024, 512, 2, (8, 8), 2), dict(stride=2), torch.float32, False, "shift"),
        ((1024, 512, 2, (8, 8), 2), dict(stride=2), torch.float16, False, "columns"),
        ((1024, 512, 3, (1, 1), 128), {}, torch.float16, True, "columns"),
        ((1024, 512, 4, (2, 2), 1), dict(stride=2, padding=1), torch.float32, True, "columns"),
        ((1024, 128, 1, (6, 6), 1), {}, torch.float32, False, "columns"),  # without them cuDNN would be asked
    ],
    ids=str,
)
def test_the_quicker_of_columns_and_shift(args, options, dtype, last, family):
    """As an H200 measured them (docs/kernels.md)."""
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    form = "vectors" if last else "width"
    facts = dict(vector=16, whole=(last, last), weight="pieces" if last else "taps")
    problem = Problem("forward", geometry, batch, c_in, c_out, size, dtype, True, form, form, **facts)
    plan = dispatch.plan(problem, Target("cuda", 90, 132, (3, 9)))
    assert plan.family == family, plan
    assert family == "columns" or "quicker than reading the weight" in plan.reason


@pytest.mark.parametrize(
    "args, options, why",
    [
        ((512, 256, 4, (8, 8), 64), dict(stride=2, padding=1), "too many pixels for the column kernels"),
        ((8, 512, 4, (1, 1), 1), {}, "too few input channels for the column kernels"),
        ((32, 8, 4, (1, 2), 1), {}, "the weight is too small for the column kernels"),
        (
            (512, 256, 4, (4, 4), 16),
            dict(stride=2, padding=1),
            "the columns would be more to move than a packed weight",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(args, options, why):
    plan = planned(args, **options)
    assert plan.family != "columns" and why in plan.reason


def test_a_weight_with_gaps_is_left(device, always):
    always()
    x, w = torch.randn(1, 40, 3, 3, device=device), torch.randn(40, 10, 4, 4, device=device)
    assert dispatch_of(x, w, None, {}).family == "columns"
    assert "without gaps" in dispatch_of(x, w.transpose(2, 3), None, {}).reason
    assert dispatch_of(x, w[::2, :, 1:].repeat_interleave(2, 0), None, {}).family == "columns"
    assert "without gaps" in dispatch_of(x, w[:, :, 1:], None, {}).reason


@pytest.fixture
def rules(monkeypatch):
    """rules(NAME=value): change what of columns decides which problems it takes."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(columns, name, value)
        dispatch.plan.cache_clear()

    yield change
    dispatch.plan.cache_clear()


@pytest.fixture
def without_shift():
    """So that what the shift kernel is quicker with is read as it lies."""
    with dispatch.without("aten", *dispatch.HOPPER):
        yield


@pytest.fixture
def without_few():
    """So that nothing else takes few output channels."""
    with dispatch.without("aten", "few", "rows"):
        yield


@pytest.fixture(params=(4, 64), ids=("whole rows", "short rows"))
def many_pixels(request, rules, without_few):
    """A few are many, and not much to move."""
    rules(MOST_PIXELS=0, FEW_OUT=8, MANY_TAPS=1, ROW=request.param)


FEW = [
    ((2, 40, 8, 8), (40, 2, 4, 4), dict(stride=2, padding=1)),
    ((2, 59, 7, 9), (59, 3, 5, 5), dict(stride=2, padding=2, output_padding=1)),
    ((1, 56, 6, 20), (56, 1, 9, 9), dict(stride=3, padding=4, output_padding=2)),
    ((2, 64, 70), (64, 5, 16), dict(stride=8, padding=4)),
    ((1, 50, 4, 4, 6), (50, 4, 3, 2, 3), dict(stride=(2, 1, 2), padding=1, dilation=(1, 2, 1))),
]


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("float64", "tf32", "bfloat16"))
@pytest.mark.parametrize(
    "shape, weight, options", FEW, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_few_output_channels(shape, weight, options, precision, last, device, many_pixels):
    """All taps of all of them as one product, of one tile of columns; images of whole tiles of pixels and others."""
    if device != "cpu" and precision == "float64":
        pytest.skip("no kernels there")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype, n = getattr(torch, precision, torch.float32), len(shape) - 2
    x, w, b = (torch.randn(s, dtype=torch.float64, device=device).to(dtype) for s in (shape, weight, weight[1:2]))
    if last and n > 1:
        x = x.contiguous(memory_format=LAST[x.ndim])
    plan = dispatch_of(x, w, b, options)
    assert plan.family == "columns" and "one product" in plan.reason, plan
    actual = TCONV[n](x, w, b, **options)
    exact = oracle(n, x, w, b, torch.zeros_like(actual), tf32=plan.precision == "tf32", **options)[0]
    assert errors(actual, exact)[1] < {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-3}[dtype]
    assert torch.equal(actual, TCONV[n](x, w, b, **options))


@pytest.mark.parametrize(
    "args, options, how, taken",
    [
        ((597, 2, 4, (48, 56), 8), dict(stride=2, padding=1), "tf32", True),
        ((56, 1, 9, (540, 960), 1), dict(stride=2, padding=4, output_padding=1), "half", True),
        ((512, 1, 16, (3999,), 16), dict(stride=8), "tf32x3", True),
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), "tf32x3", True),
        ((64, 1, 8, (32, 32), 8), dict(stride=2, padding=3), "tf32x3", True),
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), "tf32", False),
        ((128, 3, 4, (128, 128), 1), dict(stride=2, padding=1), "tf32", True),
        ((90, 3, 4, (128, 128), 1), dict(stride=2, padding=1), "tf32", False),
        ((90, 3, 4, (128, 128), 1), dict(stride=2, padding=1), "half", True),
        ((128, 1, 8, (64084,), 4), dict(stride=4), "half", False),  # few columns
        (
            (192, 3, 5, (256, 384), 1),
            dict(stride=2, padding=2, output_padding=1),
            "tf32x3",
            False,
        ),  # too many columns for it
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1), "half", False),  # too large a workspace
        ((32, 1, 9, (64, 64), 1), dict(stride=2, padding=4), "half", False),  # columns are too much to move
        ((256, 4, 3, (64, 64), 1), dict(stride=2), "half", False),
        ((64, 4, 1, (64, 64), 1), {}, "half", False),
        ((64, 3, 4, (4, 4), 1), dict(stride=2), "half", False),
        ((64, 3, 4, (64, 64), 1), dict(stride=2), "ieee", False),
    ],
)
def test_which_few_output_channels(args, options, how, taken):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    size = batch * prod(size), 2 if how == "half" else 4
    tile = columns.of_few(c_in, c_out, geometry.taps, *size, how, False, "taps", False, HOPPER)
    assert (tile is not None) == taken
    assert tile is None or (tile.columns >= c_out * geometry.taps and "columns" in tile.describe())
    assert columns.of_few(c_in, c_out, geometry.taps, *size, how, True, "taps", False, HOPPER) is None
    assert columns.of_few(c_in, c_out, geometry.taps, *size, how, False, "strided", False, HOPPER) is None
    last = columns.of_few(c_in, c_out, geometry.taps, *size, how, False, "taps", True, HOPPER)
    little = c_in >= 8 * c_out * geometry.taps or geometry.taps > 64 or how == "tf32x3"
    assert (last is not None) == (taken and little)


@pytest.mark.parametrize(
    "args, options, dtype, last, family",
    [
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3), torch.float32, False, "few"),
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3), torch.float32, True, "columns"),
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3), torch.bfloat16, False, "columns"),
        ((64, 3, 4, (128, 128), 1), dict(stride=2, padding=1), torch.bfloat16, False, "columns"),
        ((128, 2, 3, (544, 960), 1), dict(stride=2, padding=1, output_padding=1), torch.float32, False, "few"),
    ],
    ids=str,
)
def test_few_output_channels_in_fp32_are_for_the_cuda_cores(args, options, dtype, last, family):
    """Where they are busy, which takes pixels along the width, and the row kernel takes no part."""
    target = replace(HOPPER, without=("rows",))
    plan = planned(args, dtype, target=target, source="channels" if last else "width", **options)
    assert plan.family == family, plan


def test_splits_share_the_steps():
    """No part of a sum is empty, and partial sums stay within the workspace."""
    for c_in in (16, 100, 512, 4096):
        for width in (32, 2560, 8192, 1 << 20):
            for pixels in (1, 64, 384):
                tile, splits, _ = columns.choose(1, c_in, width, pixels, 4, HOPPER)
                assert splits == 1 or splits <= -(-c_in // tile.channels)
                assert splits == 1 or splits * width * pixels <= 1 << 26


@pytest.fixture
def always_weights(rules):
    """The kernel takes every weight's gradient but those of few channels."""
    of_weight = columns.of_weight
    anyhow = lambda *args: of_weight(*args[:4], 0, *args[5:])  # noqa: E731
    rules(LEAST_WEIGHT=0, SHORT=1 << 20, FEW_HALVES=1 << 20, of_weight=anyhow)
    with dispatch.without("patches", "aten"):
        yield


def gradient(x, w, grad, options):
    """(the plan of the weight's gradient, the gradient)."""
    plan = tconv.explain(x, w, **options).passes[2].plan
    w = w.detach().requires_grad_(True)
    return plan, torch.autograd.grad(TCONV[x.ndim - 2](x, w, **options), w, grad)[0]


@pytest.mark.parametrize("seed", range(40))
def test_random_gradients_of_weights(seed, device, always_weights, ieee):
    if device == "cpu" and seed in (19, 30, 37):
        pytest.skip("the interpreter is slow")
    if (layer := drawn(seed)) is None:
        pytest.skip("no output")
    x, w, _, options = layer
    grad = torch.randn(ATEN[x.ndim - 2](x, w, **options).shape, dtype=torch.float64)
    expected = oracle(x.ndim - 2, x, w, None, grad, **options)[2]
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, w, grad = (t.to(device, dtype) for t in (x, w, grad))
    if seed % 2 and x.ndim > 3:
        grad = grad.contiguous(memory_format=LAST[x.ndim])
    plan, actual = gradient(x, w, grad, options)
    assert isinstance(plan.config, columns.WeightColumns) or plan.family == "few", plan
    assert errors(actual.cpu(), expected)[1] < (1e-13 if device == "cpu" else 3e-7)
    assert torch.equal(actual, gradient(x, w, grad, options)[1])


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("where", ("input", "grad"))
def test_nan_and_inf_in_gradients_of_weights(where, value, device, always_weights, ieee):
    x, w = torch.randn(2, 70, 3, 2), torch.randn(70, 9, 4, 3)
    options = dict(stride=2, padding=1)
    grad = torch.randn(ATEN[2](x, w, **options).shape)
    alone = [torch.zeros_like(t) if (t is x) == (where == "input") else torch.ones_like(t) for t in (x, grad)]
    (x if where == "input" else grad)[1, 5, 0, 1] = value
    alone[where == "grad"][1, 5, 0, 1] = 1
    reached = (
        oracle(2, alone[0], w, None, alone[1], **options)[2] != 0
    )  # what has a product with it, inside the borders
    plan, actual = gradient(*(t.to(device) for t in (x, w, grad)), options)
    assert plan.family == "columns"
    assert 0 < reached.sum() < reached.numel() and torch.equal(actual.cpu().isfinite(), ~reached)


@pytest.mark.parametrize(
    "args, options, dtype, taken",
    [
        ((512, 512, 4, (1, 1), 1), dict(stride=2, padding=1), torch.float32, True),
        ((512, 512, 4, (1, 1), 1), dict(stride=2, padding=1), torch.bfloat16, True),
        ((1024, 512, 4, (2, 1), 1), dict(stride=2, padding=1), torch.float16, True),
        ((1024, 512, 4, (2, 2), 1), dict(stride=2, padding=1), torch.float16, False),
        ((1024, 512, 4, (6, 6), 1), dict(stride=2, padding=1), torch.float32, True),
        ((1024, 512, 4, (8, 8), 1), dict(stride=2, padding=1), torch.float32, False),
        ((100, 512, 4, (1, 1), 64), {}, torch.float32, False),
        ((100, 512, 4, (1, 1), 32), {}, torch.float32, True),
        ((64, 64, 2, (4, 4), 4), dict(stride=2), torch.float32, False),  # not mostly the weight
    ],
)
def test_which_gradients_of_weights(args, options, dtype, taken):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    problem = Problem("backward_weight", geometry, batch, c_in, c_out, size, dtype, True, "width")
    plan = dispatch.plan(problem, HOPPER)
    assert isinstance(plan.config, columns.WeightColumns) == taken, plan
    assert not taken or "columns" in plan.config.describe()


@pytest.mark.gpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize(
    "args, options",
    [
        ((512, 512, 4, (1, 1), 1), dict(stride=2, padding=1)),
        ((1024, 512, 4, (2, 2), 1), dict(stride=2, padding=1)),
        ((320, 320, 2, (2, 2, 2), 1), dict(stride=2)),
        ((1536, 768, 16, (4,), 1), dict(stride=8)),
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_gradients_of_weights_on_a_gpu(args, options, precision, last, rules):
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = getattr(torch, precision, torch.float32)
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    x = torch.randn(batch, c_in, *size, device="cuda").to(dtype)
    w = torch.empty(c_in, c_out, *geometry.kernel, device="cuda", dtype=dtype)
    grad = torch.randn(batch, c_out, *geometry.output_size(size), device="cuda").to(dtype)
    if last and geometry.ndim > 1:
        x, w, grad = (t.contiguous(memory_format=LAST[t.ndim]) for t in (x, w, grad))
    rules(FEW_HALVES=16)
    plan, actual = gradient(x, w, grad, options)
    assert isinstance(plan.config, columns.WeightColumns), plan
    exact = oracle(geometry.ndim, x, w, None, grad, **options)[2]
    assert errors(actual, exact)[1] < {torch.float32: 2e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    assert torch.equal(actual, gradient(x, w, grad, options)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize(
    "args, options",
    [
        ((597, 2, 4, (48, 56), 8), dict(stride=2, padding=1)),
        ((661, 2, 4, (12, 14), 8), dict(stride=2, padding=1)),
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3)),
        ((192, 3, 5, (256, 384), 1), dict(stride=2, padding=2, output_padding=1)),
        ((512, 1, 16, (3999,), 16), dict(stride=8)),
        ((128, 2, 3, (17, 30, 31), 2), dict(stride=2, padding=1, output_padding=1)),
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_few_output_channels_on_a_gpu(args, options, precision, last, rules, without_few):
    """At full size, no worse than torch; the same bits every time."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = getattr(torch, precision, torch.float32)
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    n = geometry.ndim
    x = torch.randn(batch, c_in, *size, device="cuda").to(dtype)
    w = torch.randn(c_in, c_out, *geometry.kernel, device="cuda").to(dtype)
    if last and n > 1:
        x = x.contiguous(memory_format=LAST[x.ndim])
    rules(MANY_TAPS=1)
    plan = dispatch_of(x, w, None, options)
    assert plan.family == "columns" or precision == "ieee", plan
    actual = TCONV[n](x, w, None, **options)
    if plan.precision == "tf32":
        expected = oracle(n, x, w, None, torch.zeros_like(actual), tf32=True, **options)[0]
        assert errors(actual, expected)[1] < 4e-6
    else:
        assert_no_worse(actual, ATEN[n](x.double(), w.double(), **options), ATEN[n](x, w, **options), str(plan))
    assert torch.equal(actual, TCONV[n](x, w, None, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize("args, options", WEIGHTS, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "")
def test_on_a_gpu(args, options, precision, last, without_shift):
    """At full size, weight and input in either format; the same bits every time."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = getattr(torch, precision, torch.float32)
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    n, format = geometry.ndim, {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
    x = torch.randn(batch, c_in, *size, device="cuda").to(dtype)
    w = (torch.randn(c_in, c_out, *geometry.kernel, device="cuda") / 32).to(dtype)
    b = torch.randn(c_out, device="cuda").to(dtype)
    if last:
        x, w = (t.contiguous(memory_format=format[n]) for t in (x, w))
    plan = dispatch_of(x, w, b, options)
    assert plan.family == "columns", plan
    actual = TCONV[n](x, w, b, **options)
    if plan.precision == "tf32":
        expected = oracle(n, x, w, b, torch.zeros_like(actual), tf32=True, **options)[0]
        assert errors(actual, expected)[1] < 4e-6
    else:
        exact = ATEN[n](x.double(), w.double(), b.double(), **options)
        assert_no_worse(actual, exact, ATEN[n](x, w, b, **options), str(plan))
    assert torch.equal(actual, TCONV[n](x, w, b, **options))
