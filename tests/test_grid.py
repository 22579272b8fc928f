"""The grid kernel: where pixels lie, which weights' gradients it takes, with which tile, and that these are the gradients."""

import itertools
import random
from dataclasses import replace
from math import prod

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, passes
from test_aot import layer
from test_passes import LAST, TCONV
from test_patches import at_full_size
from test_shift import HOPPER

import tconv
from tconv import dispatch, grid
from tconv.configs import MOST_SUM, PARTS, Target
from tconv.geometry import Geometry, sizes3
from tconv.problem import PASSES, Problem
from tconv.workloads import SUITES, layers

TARGET = Target("cuda", 90, 132, (3, 9), ("aten",))


def drawn(seed):
    """A random layer's input, weight and output's gradient in float64, and its arguments."""
    draw = random.Random(seed)
    ndim = draw.choice((1, 2, 2, 3))
    c_in, c_out = draw.choice(((8, 5), (33, 64), (70, 9)))
    batch = draw.choice((1, 2, 3, 4, 6))
    kernel = [draw.randint(1, (7, 4, 2)[ndim - 1]) for _ in range(ndim)]
    stride = [draw.randint(1, 3) for _ in range(ndim)]
    dilation = [draw.choice((1, 1, 2, 3)) for _ in range(ndim)]
    output_padding = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    size = [draw.randint(1, (40, 6, 4)[ndim - 1]) for _ in range(ndim)]
    # At most as much as leaves an output.
    whole = [(n - 1) * s + d * (k - 1) for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    padding = [draw.randint(0, min(4, n // 2)) for n in whole]
    geometry = Geometry(*map(tuple, (kernel, stride, padding, output_padding)), 1, tuple(dilation))
    torch.manual_seed(seed)
    shapes = (batch, c_in, *size), (c_in, c_out, *kernel), (batch, c_out, *geometry.output_size(size))
    input, weight, grad = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    if ndim > 1 and draw.random() < 0.5:
        input = input.contiguous(memory_format=LAST[input.ndim])
    if ndim > 1 and draw.random() < 0.5:
        grad = grad.contiguous(memory_format=LAST[input.ndim])
    options = dict(stride=stride, padding=padding, output_padding=output_padding, dilation=dilation)
    return (input, weight, grad), options, geometry


@pytest.mark.parametrize("seed", range(100))
def test_products_on_the_grid_are_the_gradient(seed):
    """The copies and the product in plain torch, by the formulas of grid.py; places beyond a grid's end are zero."""
    (x, w, grad), options, geometry = drawn(seed)
    batch, axes = x.shape[0], geometry.axes3
    spots = grid.spots(geometry, batch, x.shape[2:])
    images = batch * spots.parts
    assert images % grid.PIECE == 0

    def laid(t, size, phase, strides, fronts):
        """[channels, places] of one phase."""
        found = torch.zeros(t.shape[1], *size, images, dtype=t.dtype)
        t = t.reshape(*t.shape[:2], *sizes3(t.shape[2:]))
        for image, i in itertools.product(range(images), itertools.product(*map(range, size))):
            n, part = divmod(image, spots.parts)
            at = [
                (part * b + j) * s + a - f for b, j, s, a, f in zip(spots.step, i, strides, phase, fronts, strict=True)
            ]
            if all(0 <= k < n for k, n in zip(at, t.shape[2:], strict=True)):
                found[(slice(None), *i, image)] = t[(n, slice(None), *at)]
        return found.flatten(1)

    ones, strides = (1, 1, 1), tuple(a.stride for a in axes)
    fronts = tuple(a.padding + grid.lead(a) for a in axes)
    input = laid(x, spots.rows, (0, 0, 0), ones, (0, 0, 0))
    phases = {
        phase: laid(grad, spots.reached, phase, strides, fronts) for phase in itertools.product(*map(range, strides))
    }
    assert (input.shape[1], phases[0, 0, 0].shape[1]) == spots.places(batch)
    expected = passes(ATEN[x.ndim - 2], x, w, None, grad, **options)[2].flatten(2)
    taps = itertools.product(*(range(a.kernel) for a in axes))
    for t, tap in enumerate(taps):
        reach = [k * a.dilation + grid.lead(a) for k, a in zip(tap, axes, strict=True)]
        y = phases[tuple(r % a.stride for r, a in zip(reach, axes, strict=True))]
        behind = [r // a.stride for r, a in zip(reach, axes, strict=True)]
        first = ((behind[0] * spots.reached[1] + behind[1]) * spots.reached[2] + behind[2]) * images
        seen = torch.nn.functional.pad(y, (0, input.shape[1]))[:, first : first + input.shape[1]]
        torch.testing.assert_close(input @ seen.T, expected[..., t])


@pytest.fixture
def always(monkeypatch):
    """The kernel takes every such gradient, also where it is not worth it."""
    for name, value in dict(
        LEAST_CHANNELS=1, LEAST_PLACES=1, MOST_PLACES_A_PIXEL=1 << 20, LEAST_PRODUCTS=0, LEAST_PRODUCTS_LAST=0
    ).items():
        monkeypatch.setattr(grid, name, value)
    dispatch.plan.cache_clear()
    with dispatch.without("few", "columns", "long", "patches", "aten"):
        yield
    dispatch.plan.cache_clear()


@pytest.mark.parametrize("precision", ("ieee", "tf32"))
@pytest.mark.parametrize("seed", range(24))
def test_random_layers(seed, precision, device, always):
    """Against the oracle, the same bits every time."""
    tensors, options, _ = drawn(seed)
    if device == "cuda" and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    if device == "cpu" and seed not in (3, 6, 8, 10, 18):
        pytest.skip("the interpreter is slow")
    torch.backends.cudnn.conv.fp32_precision = precision
    x, w, grad = (t.to(device, torch.float32) for t in tensors)
    ndim = x.ndim - 2
    plan = tconv.explain(x, w, **options).passes[2].plan
    if plan.precision == "ieee":
        pytest.skip("sums so short have no tensor core to go to")
    assert plan.family == "grid" and "side by side" in plan.reason and "places" in plan.config.describe()
    actual, again = (passes(TCONV[ndim], x, w, None, grad, **options)[2] for _ in range(2))
    exact = passes(ATEN[ndim], x.double(), w.double(), None, grad.double(), **options)[2]
    assert errors(actual, exact)[1] < (4e-6 if plan.precision == "tf32x3" else 2e-3)
    assert torch.equal(actual, again)


@pytest.mark.parametrize(
    "args, options, change, taken",
    [
        ((64, 64, 4, (64, 64), 8), dict(stride=2, padding=1), {}, True),
        ((64, 64, 4, (64, 64), 8), dict(stride=2, padding=1), dict(dtype=torch.bfloat16), False),
        ((64, 64, 4, (64, 64), 8), dict(stride=2, padding=1), dict(tf32=True), True),  # where aten takes no part
        ((64, 64, 4, (64, 64), 8), dict(stride=2, padding=1), dict(large=True), False),
        ((64, 64, 4, (64, 64), 8), dict(stride=2, padding=1), dict(source="strided"), True),
        ((64, 64, 3, (24, 25), 1), dict(padding=1, dilation=2), {}, True),
        ((512, 17, 4, (14, 14), 100), dict(stride=2, padding=1), {}, True),
        ((64, 14, 4, (64, 64), 8), dict(stride=2, padding=1), {}, False),
        ((64, 64, 1, (64, 64), 8), dict(stride=2), {}, False),
        ((64, 64, 4, (64, 64), 8), dict(stride=2, padding=1, groups=2), {}, False),
        ((64, 64, 7, (2, 2), 16), dict(padding=3), {}, False),  # zeros around so few pixels
        ((256, 128, 16, (500,), 1), dict(stride=8, padding=4), {}, True),
        ((64, 32, 2, (128, 256, 256), 4), dict(stride=2), {}, False),  # copies of 12 GB
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_which(args, options, change, taken):
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    for direction in PASSES:
        facts = dict(dtype=torch.float32, tf32=False, source="width", destination="width") | change
        problem = Problem(direction, geometry, batch, c_in, c_out, size, **facts)
        chosen = dispatch.plan(problem, TARGET)
        assert (chosen.family == "grid") == (taken and direction == "backward_weight"), chosen
        for other in (replace(TARGET, arch=80), replace(TARGET, arch=100), replace(TARGET, without=("aten", "grid"))):
            assert dispatch.plan(problem, other).family != "grid"


def test_tiles_fit_and_cover():
    """Of every layer of the suites that the kernel takes: the stages fit the shared memory, the parts of the sums cover them,
    and bulk copies begin at multiples of 16 bytes."""
    found = 0
    for case in (each for suite in SUITES for each in layers(suite)):
        facts = case.geometry, case.input_shape[0], case.in_channels, case.out_channels, case.input_shape[2:]
        for tf32 in (False, True):
            problem = Problem("backward_weight", *facts, torch.float32, tf32, "width")
            chosen = dispatch.plan(problem, TARGET)
            if chosen.family != "grid":
                continue
            found += 1
            tile, spots = chosen.config, grid.spots(case.geometry, problem.batch, problem.input_size)
            places = spots.places(problem.batch)[0]
            stage = 4 * grid.PLACES * (tile.inputs + tile.taps * tile.outputs) * PARTS[chosen.precision]
            assert 2 <= tile.num_stages <= grid.SHARED // stage
            each, steps = chosen.tiles_per_split, -(-places // grid.PLACES)
            assert (chosen.splits - 1) * each < steps <= chosen.splits * each
            assert each * grid.PLACES <= MOST_SUM + grid.PLACES or chosen.splits * prod(case.weight_shape) > 1 << 25
            assert problem.batch * spots.parts % grid.PIECE == 0
    assert found > 100


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("precision", ("ieee", "tf32"))
@pytest.mark.parametrize(
    "args, options",
    [
        ((64, 64, 4, (64, 80), 16), dict(stride=2, padding=1)),
        ((128, 128, 3, (63, 65), 5), dict(stride=2, padding=1, output_padding=1)),
        ((256, 130, 2, (56, 56), 4), dict(stride=2)),
        ((512, 512, 4, (8, 8), 1), dict(stride=2, padding=1)),
        ((96, 48, 5, (40, 48), 2), dict(stride=2, padding=2, output_padding=1)),
        ((100, 70, 3, (60, 75), 3), dict(padding=1, dilation=2)),
        ((512, 256, 16, (812,), 1), dict(stride=8, padding=4)),
        ((128, 64, 4, (4000,), 6), dict(stride=2, padding=1)),
        ((96, 48, 5, (40, 49), 2), dict(stride=2, padding=2)),
        ((128, 32, 3, (48, 48), 8), dict(padding=1)),
        ((64, 64, 3, (9, 30, 31), 2), dict(stride=2, padding=1)),
        ((32, 64, 3, (16, 32, 32), 8), dict(padding=1)),
        ((128, 32, 2, (24, 24, 24), 4), dict(stride=2)),
        ((512, 17, 4, (14, 14), 100), dict(stride=2, padding=1)),
        ((21, 21, 3, (64, 64), 8), dict(padding=1)),
    ],
    ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_on_a_gpu(args, options, precision, last):
    """At full size, no worse than torch; the same bits every time."""
    torch.backends.cudnn.conv.fp32_precision = precision
    x, w, grad = at_full_size(layer(*args, **options), torch.float32, last)
    n = x.ndim - 2
    plan = tconv.explain(x, w, **options).passes[2].plan
    assert plan.family == "grid", plan
    actual, again = (passes(TCONV[n], x, w, None, grad, **options)[2] for _ in range(2))
    exact = passes(ATEN[n], x.double(), w.double(), None, grad.double(), **options)[2]
    peer = passes(ATEN[n], x, w, None, grad, **options)[2]
    assert_no_worse(actual, exact, peer, str(plan))
    assert torch.equal(actual, again)
