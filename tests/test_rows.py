"""The row kernel: which forward passes it takes, that its strips cover every output, and that these are right."""

import random
from dataclasses import replace
from math import prod

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, oracle
from test_aot import layer
from test_passes import LAST, TCONV
from test_patches import at_full_size
from test_shift import HOPPER

import tconv
from tconv import dispatch, rows
from tconv.configs import Target
from tconv.geometry import Geometry, sizes3
from tconv.problem import IEEE_PRODUCTS, PASSES, Problem
from tconv.workloads import SUITES, layers

TARGET = Target("cuda", 90, 132, (3, 9))
OTHERS = Target("cuda", 80, 108, (3, 9)), Target("cuda", 100, 148, (3, 9)), Target("hip", 942, 304)


def forward_of(x, w, b, options):
    return tconv.explain(x, w, b, **options).passes[0].plan


@pytest.fixture
def always(monkeypatch):
    """The kernel takes every such layer, also where it is not worth it."""
    for name, value in dict(FEW_OUT=8, LEAST_COLUMNS=1, LEAST_CHANNELS=1, LEAST_WIDTH=1, LEAST_PIXELS=0).items():
        monkeypatch.setattr(rows, name, value)
    dispatch.plan.cache_clear()
    yield
    dispatch.plan.cache_clear()


def drawn(seed):
    """A random layer's input, weight and bias in float64, and its arguments."""
    draw = random.Random(seed)
    c_in, c_out, batch = draw.choice((3, 20, 32, 70)), draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3))
    kernel = [draw.randint(1, n) for n in (5, 7)]
    stride = [draw.randint(1, min(4, k)) for k in kernel]
    dilation = [draw.choice((1, 1, 2, 3)) for _ in range(2)]
    output_padding = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    size = [draw.randint(1, n) for n in (20, 150)]
    whole = [(n - 1) * s + d * (k - 1) for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    padding = [draw.randint(0, min(7, n // 2)) for n in whole]
    options = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation)
    geometry = Geometry(*map(tuple, (kernel, stride, padding, output_padding)), 1, tuple(dilation))
    torch.manual_seed(seed)
    shapes = (batch, c_in, *size), (c_in, c_out, *kernel), (c_out,)
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    if draw.random() < 0.4:
        x = x.contiguous(memory_format=LAST[x.ndim])
    if draw.random() < 0.4:
        w = w.contiguous(memory_format=LAST[x.ndim])
    return (x, w, b if draw.random() < 0.7 else None), options, geometry


@pytest.mark.parametrize("seed", range(200))
def test_strips_cover_every_output(seed):
    """Each output once, with all inputs that reach it in the ring or among those of the step."""
    (x, _, _), _, g = drawn(seed)
    facts = dict(vector=random.Random(seed).choice((1, 2, 4, 16)), tf32=True, dtype=torch.float32)
    problem = Problem("forward", g, x.shape[0], x.shape[1], 2, tuple(x.shape[2:]), source="width", **facts)
    tile, size, out = rows.choose(problem, TARGET), sizes3(x.shape[2:]), sizes3(g.output_size(x.shape[2:]))
    if tile is None:
        assert rows.back(g.axes3[1]) > 7
        pytest.skip("rows so far apart that the ring would not stay in the L2")
    assert tile.width % tile.piece == size[2] % tile.piece == 0 and tile.rows * tile.width == rows.PIXELS
    (_, tall, wide), before = g.axes3, rows.before(g.axes3[2], tile.piece)
    # Along the height: chunks of whole steps, each of which has the rows that it needs in its ring.
    first, count = rows.reached(g, size, 1)
    needed = range(tall.padding, tall.padding + out[1])
    assert needed[0] // tall.stride == first and needed[-1] // tall.stride == first + count - 1
    assert (
        tile.chunk_rows % tile.rows == 0
        and (tile.chunks - 1) * tile.chunk_rows < count <= tile.chunks * tile.chunk_rows
    )
    assert tile.ring >= tile.rows + rows.back(tall) and tile.ring & (tile.ring - 1) == 0
    assert rows.warm(tall, tile.rows) >= rows.back(tall)
    # Along the width: the last input of a strip's last position is in it, and the first one of its first.
    first, count = rows.reached(g, size, 2)
    inner = rows.inner(wide, tile.width, tile.piece)
    assert before >= rows.back(wide) and inner + before <= tile.width and inner > 0
    assert (first - before) % tile.piece == inner % tile.piece == 0
    assert first == wide.padding // wide.stride and (first + count - 1) == (wide.padding + out[2] - 1) // wide.stride
    for axis in (tall, wide):
        assert max(
            -n for p in range(axis.stride) for _, n in replace(axis, padding=0).taps(p) or [(0, 0)]
        ) <= rows.back(axis)


@pytest.mark.parametrize("precision", ("float16", "tf32", "bfloat16"))
@pytest.mark.parametrize("seed", range(40))
def test_random_layers(seed, precision, device, always):
    """Against the oracle, the same bits every time."""
    tensors, options, geometry = drawn(seed)
    if device == "cpu" and seed > (12 if precision == "tf32" else 11):  # that one takes half a minute
        pytest.skip("the interpreter is slow")
    if device == "cuda" and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    dtype = getattr(torch, precision, torch.float32)
    x, w, b = (None if t is None else t.to(device, dtype) for t in tensors)
    plan = forward_of(x, w, b, options)
    if plan.family != "rows":
        short = x.shape[1] * prod(a.most_taps for a in geometry.axes) < IEEE_PRODUCTS and dtype is torch.float32
        far = rows.back(geometry.axes[-1]) >= rows.MOST_BACK
        assert short or far or w.shape[1] * geometry.taps > rows.MOST_COLUMNS, plan
        pytest.skip("sums so short have no tensor core to go to, too many columns, or too far apart")
    assert "one product" in plan.reason and "a ring of" in plan.config.describe()
    actual = TCONV[2](x, w, b, **options)
    exact = oracle(2, x, w, b, torch.zeros_like(actual), tf32=plan.precision == "tf32", **options)[0]
    assert errors(actual, exact)[1] < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]
    assert torch.equal(actual, TCONV[2](x, w, b, **options))


@pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs a Hopper GPU")
def test_infinities_beside_the_border(device, always):
    """What lies outside of the input multiplies nothing, an infinite weight neither."""
    x = torch.randn(1, 20, 9, 70, device=device)
    w = torch.randn(20, 2, 4, 4, device=device)
    w[:, :, 0, 0] = float("inf")
    options = dict(stride=2, padding=1)
    assert forward_of(x, w, None, options).family == "rows"
    actual, expected = (
        TCONV[2](x, w, None, **options),
        ATEN[2](x.cpu(), w.cpu(), None, **options),
    )  # cuDNN's are all NaN
    assert torch.equal(actual.isfinite().cpu(), expected.isfinite())


@pytest.mark.parametrize(
    "args, options, change, taken",
    [
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1), {}, True),
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1), dict(dtype=torch.float16), True),
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1), dict(tf32=False), False),
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1), dict(large=True), False),
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1), dict(weight="strided"), True),
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1, groups=1), dict(source="strided"), True),
        ((56, 1, 9, (540, 960), 1), dict(stride=2, padding=4, output_padding=1), {}, True),
        ((90, 5, 4, (272, 480), 1), dict(stride=2, padding=1), {}, False),  # many output channels
        ((64, 3, 7, (128, 128), 128), dict(stride=2, padding=1), {}, False),  # many columns
        ((64, 1, 2, (320, 320), 16), dict(stride=2), {}, False),  # few
        ((8, 3, 4, (128, 128), 128), dict(stride=2, padding=1), {}, False),  # short sums
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), {}, False),  # small images
        ((128, 3, 4, (128, 128), 1), dict(stride=2, padding=1), {}, False),  # few pixels
        ((64, 3, 3, (64, 64, 128), 1), dict(stride=2), {}, False),
        ((64, 1, 24, (4000,), 32), dict(stride=8), {}, False),
        ((64, 3, 3, (128, 128), 128), dict(stride=8), {}, False),  # phases without taps
        ((64, 3, 5, (2, 128), 700), dict(padding=3), {}, False),  # no output
        ((64, 1, 9, (512, 512), 1), dict(dilation=14), {}, False),  # rows far apart
    ],
    ids=str,
)
def test_which(args, options, change, taken):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    for direction in PASSES:
        facts = dict(dtype=torch.float32, tf32=True, source="width") | change
        plan = dispatch.plan(Problem(direction, geometry, batch, c_in, c_out, size, **facts), TARGET)
        assert (plan.family == "rows") == (taken and direction == "forward"), plan
        for other in OTHERS:
            assert (
                dispatch.plan(Problem(direction, geometry, batch, c_in, c_out, size, **facts), other).family != "rows"
            )


def test_the_suites_rings_stay_in_the_l2():
    found = 0
    for case in (each for suite in SUITES for each in layers(suite)):
        facts = case.geometry, case.input_shape[0], case.in_channels, case.out_channels, case.input_shape[2:]
        problem = Problem("forward", *facts, torch.float32, True, "width", vector=16)
        plan = dispatch.plan(problem, TARGET)
        if plan.family != "rows":
            continue
        found += 1
        columns = case.out_channels * case.geometry.taps
        assert 4 * columns * plan.config.ring * plan.config.width * plan.config.shape.resident * 132 <= rows.RINGS, (
            case.name,
            plan,
        )
    assert found > 5


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("tf32", "float16", "bfloat16"))
@pytest.mark.parametrize(
    "args, options",
    [
        ((64, 3, 4, (128, 128), 32), dict(stride=2, padding=1)),
        ((192, 3, 5, (256, 384), 1), dict(stride=2, padding=2, output_padding=1)),
        ((56, 1, 9, (270, 480), 1), dict(stride=2, padding=4, output_padding=1)),
        ((56, 1, 9, (135, 243), 2), dict(stride=3, padding=4, output_padding=2)),
        ((128, 2, 3, (136, 241), 1), dict(stride=2, padding=1, output_padding=1)),
        ((90, 5, 4, (136, 240), 1), dict(stride=2, padding=1)),
        ((33, 3, 3, (60, 71), 3), dict(padding=1)),
        ((48, 8, 4, (20, 2000), 2), dict(stride=4)),
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_on_a_gpu(args, options, precision, last, always):
    """At full size, no worse than torch; the same bits every time."""
    torch.backends.cudnn.conv.fp32_precision = precision if precision == "tf32" else "ieee"
    x, w, _ = at_full_size(layer(*args, **options), getattr(torch, precision, torch.float32), last)
    b = torch.randn(args[1], device="cuda").to(x.dtype)
    with dispatch.without("few", "columns", "aten"):
        plan = forward_of(x, w, b, options)
        assert plan.family == "rows", plan
        actual, again = (TCONV[2](x, w, b, **options) for _ in range(2))
    exact = ATEN[2](x.double(), w.double(), b.double(), **options)
    assert_no_worse(actual, exact, ATEN[2](x, w, b, **options), str(plan))
    assert torch.equal(actual, again)
