"""The long-stride kernels: which problems they take, with which tile, and that these make the convolution."""

import random

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, oracle, passes
from test_aot import layer
from test_passes import LAST, NAMES, TCONV

import tconv
from tconv import columns, dispatch, long
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.problem import PASSES, Problem

HOPPER = Target("cuda", 90, 132)


def drawn(seed):
    """A random layer of few channels and long strides and its tensors in float64, or None where it has no output."""
    draw = random.Random(seed)
    ndim = draw.choice((1, 2, 2, 3))
    c_in, c_out, groups = draw.choice(((1, 1, 3), (2, 3, 2), (1, 1, 5), (4, 1, 2), (5, 7, 1), (9, 2, 1)))
    last = draw.randint(8, 12)
    stride = [draw.choice((1, 2, 8)) for _ in range(ndim - 1)] + [last]
    if groups == 1:  # as many phases as such layers need
        ndim, stride = max(ndim, 2), [1] * (max(ndim, 2) - 2) + [32, last]
    kernel = [draw.randint(1, 5) for _ in range(ndim - 1)] + [draw.choice((last, last + 3, 2 * last, 33))]
    dilation = [draw.choice((1, 1, 1, 2)) for _ in range(ndim)]
    padding = [draw.randint(0, 2) for _ in range(ndim - 1)] + [draw.randint(0, 6)]
    output_padding = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    size = [draw.randint(1, 3) for _ in range(ndim - 1)] + [draw.randint(1, 6)]
    geometry = Geometry(*map(tuple, (kernel, stride, padding, output_padding)), groups, tuple(dilation))
    if min(geometry.output_size(size)) < 1:
        return None
    torch.manual_seed(seed)
    input, weight = torch.randn(2, c_in * groups, *size), torch.randn(c_in * groups, c_out, *kernel)
    bias, grad = torch.randn(c_out * groups), torch.randn(2, c_out * groups, *geometry.output_size(size))
    tensors = [t.double() for t in (input, weight, bias, grad)]
    if ndim > 1 and draw.random() < 0.4:
        tensors[0], tensors[3] = (t.contiguous(memory_format=LAST[t.ndim]) for t in (tensors[0], tensors[3]))
    if draw.random() < 0.3:
        tensors[1] = tensors[1].movedim(1, -1).contiguous().movedim(-1, 1)
    tensors[2] = tensors[2] if draw.random() < 0.5 else None
    options = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups, dilation=dilation)
    return tensors, options


SLOW = 0, 1, 3, 5, 9, 11, 12, 14, 16, 17, 19, 20, 21, 30, 33, 37  # in the interpreter, 20 s to two minutes


@pytest.mark.parametrize("seed", range(40))
def test_random_layers(seed, device, ieee):
    """All three passes, also in parts; the same bits every time."""
    if device == "cpu" and seed in SLOW:
        pytest.skip("the interpreter is slow")
    if (layer := drawn(seed)) is None:
        pytest.skip("no output")
    tensors, options = layer
    ndim = tensors[0].ndim - 2
    expected = oracle(ndim, *tensors, **options)
    dtype = torch.float64 if device == "cpu" else torch.float32
    tensors = [None if t is None else t.to(device, dtype) for t in tensors]
    with dispatch.without("few", "columns", *dispatch.HOPPER, "aten"):
        explained = tconv.explain(*tensors[:3], **options).passes
        actual, again = (passes(TCONV[ndim], *tensors, **options) for _ in range(2))
    for name, ours, same, exact in zip(NAMES, actual, again, expected, strict=False):
        assert errors(ours.cpu(), exact)[1] < (1e-13 if device == "cpu" else 3e-7), name
        assert torch.equal(ours, same), name
    is_direct = options["groups"] > 1  # groups here have at most 4 channels
    along_width = explained[2].problem.destination == "width"
    taken = [each.plan.family == "long" for each in explained]
    assert taken == [is_direct and max(options["dilation"]) == 1, True, is_direct and along_width], explained


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("where", ("input", "weight", "grad"))
@pytest.mark.parametrize("kernel", (16, 13))
def test_nan_and_inf(kernel, where, value, device, ieee):
    """They go where a product with them goes, neither beyond a border nor to a phase without that tap."""
    x, w = torch.randn(1, 4, 3, 4), torch.randn(4, 2, kernel, kernel)
    options = dict(stride=8, padding=3, groups=2)
    grad = torch.randn(ATEN[2](x, w, **options).shape)
    tensors = dict(input=x, weight=w, grad=grad)
    alone = {name: torch.zeros_like(t) if name == where else torch.ones_like(t) for name, t in tensors.items()}
    tensors[where][0, 1, 2, 1] = value
    alone[where][0, 1, 2, 1] = 1
    reached = [r != 0 for r in oracle(2, alone["input"], alone["weight"], None, alone["grad"], **options)[:3]]
    with dispatch.without("few", "columns", *dispatch.HOPPER, "aten"):
        actual = passes(TCONV[2], *(t.to(device) for t in (x, w)), None, grad.to(device), **options)
        told = tconv.explain(x.to(device), w.to(device), **options).passes
    of = {"input": (0, 2), "weight": (0, 1), "grad": (1, 2)}[where]
    assert [each.plan.family for each in told] == ["long"] * 3
    for i in of:
        assert 0 < reached[i].sum() < reached[i].numel()
        assert torch.equal(actual[i].cpu().isfinite(), ~reached[i]), NAMES[i]


@pytest.mark.parametrize(
    "args, options, last, taken",
    [
        ((21, 21, 64, (16, 16), 1), dict(stride=32, padding=16, groups=21), False, "all"),
        ((21, 21, 64, (16, 16), 1), dict(stride=32, padding=16, groups=21), True, "forward backward_input"),
        ((21, 21, 16, (64, 64), 4), dict(stride=8, padding=4, groups=21), False, "all"),
        ((21, 21, 64, (12, 16), 1), dict(stride=32), True, "backward_input"),
        ((21, 21, 64, (12, 16), 1), dict(stride=32, dilation=2), True, "backward_input"),
        ((21, 21, 64, (12, 16), 512), dict(stride=32), True, ""),  # too many products
        ((16, 16, 16, (32, 32), 1), dict(stride=8), True, ""),  # too few phases
        ((64, 64, 64, (12, 16), 1), dict(stride=32), True, ""),
        ((64, 64, 16, (32, 32), 1), dict(stride=8, groups=64), True, ""),  # the direct kernels'
        ((21, 21, 4, (32, 32), 1), dict(stride=2, groups=21), False, ""),
        ((21, 21, 4, (32, 32), 1), dict(stride=8, groups=21), False, ""),
    ],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_which_layers(args, options, last, taken, dtype):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    taken = PASSES if taken == "all" else taken.split()
    layout = "channels" if last else "width"
    for direction in PASSES:
        problem = Problem(direction, geometry, batch, c_in, c_out, size, dtype, True, layout, layout)
        plan = dispatch.plan(problem, HOPPER)
        assert (plan.family == "long") == (direction in taken), plan
        if plan.family == "long":
            assert "lie side by side" in plan.reason and plan.config.describe()


def test_an_empty_batch(device):
    """explain() asks what would run."""
    x, w = torch.empty(0, 3, 4, 4, device=device), torch.randn(3, 1, 64, 64, device=device)
    told = tconv.explain(x, w, stride=32, groups=3).passes
    assert [each.plan.family for each in told] == ["long"] * 3


def test_parts_of_sums():
    """None is empty, and together they fit into the workspace."""
    for batch, size, groups, channels in (
        (1, (1, 1), 1, 21),
        (1, (2, 2), 21, 1),
        (4, (32, 32), 21, 1),
        (64, (64, 64), 3, 4),
        (16, (256, 256), 21, 1),
    ):
        geometry = Geometry((64, 64), (32, 32), (16, 16), (0, 0), groups, (1, 1))
        for direction in PASSES[1:]:
            tile, splits = long.choose(direction, geometry, batch, channels, channels, size, HOPPER)
            if direction == "backward_input":
                steps, elements = channels * 64 // tile.taps_h, batch * size[0] * size[1]
            else:
                steps, elements = -(-batch * size[0] * size[1] // columns.UNROLL), channels * geometry.taps
            assert 1 <= splits <= steps and splits * steps < 1 << 31
            assert splits == 1 or splits * groups * channels * elements <= 1 << 26


@pytest.mark.gpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize(
    "args, options",
    [
        ((21, 21, 64, (16, 16), 1), dict(stride=32, padding=16, groups=21)),
        ((21, 21, 64, (32, 32), 4), dict(stride=32, padding=16, groups=21)),
        ((21, 21, 16, (33, 41), 2), dict(stride=8, padding=4, groups=21)),
        ((12, 24, 12, (20, 31), 3), dict(stride=8, padding=1, output_padding=3, groups=6)),
        ((21, 21, 64, (12, 16), 1), dict(stride=32)),
        ((8, 8, 9, (3, 10, 11), 2), dict(stride=8, padding=2, groups=8)),
        ((6, 6, 16, (150, 160), 8), dict(stride=8, padding=4, groups=6)),  # long sums of weights' gradients
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_on_a_gpu(args, options, precision, last):
    """At full size, no worse than torch; the same bits every time."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    dtype = getattr(torch, precision, torch.float32)
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    n = geometry.ndim
    x = torch.randn(batch, c_in, *size, device="cuda").to(dtype)
    w = torch.randn(c_in, c_out // geometry.groups, *geometry.kernel, device="cuda").to(dtype)
    b = torch.randn(c_out, device="cuda").to(dtype)
    grad = torch.randn(batch, c_out, *geometry.output_size(size), device="cuda").to(dtype)
    if last:
        x, grad = (t.contiguous(memory_format=LAST[t.ndim]) for t in (x, grad))
    told = tconv.explain(x, w, b, **options).passes
    actual, again = (passes(TCONV[n], x, w, b, grad, **options) for _ in range(2))
    exact = oracle(n, x, w, b, grad, **options)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    peer = passes(ATEN[n], x, w, b, grad, **options)
    for each, a, same, e, p in zip(told, actual, again, exact, peer, strict=False):
        if each.plan.family == "long":
            assert_no_worse(a, e, p, str(each))
            assert torch.equal(a, same), str(each)
    assert "long" in [each.plan.family for each in told]
