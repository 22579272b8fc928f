"""The few-channel kernel: which problems it takes, with which tile, and that these make the convolution."""

import random

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors
from test_aot import layer
from test_passes import TCONV

import tconv
from tconv import few
from tconv.configs import Target
from tconv.geometry import Geometry

HOPPER = Target("cuda", 90, 132)


def drawn(seed):
    """A random layer of few channels and its tensors in float64, or None where it has no output."""
    draw = random.Random(seed)
    ndim, groups = draw.choice((1, 2, 2, 3)), draw.choice((1, 1, 3))
    c_in, c_out = (
        draw.choice(((1, 8), (4, 12), (8, 1), (3, 3), (20, 5))) if groups == 1 else draw.choice(((1, 1), (2, 3)))
    )
    most = 5 if ndim < 3 else 3
    kernel = [draw.randint(1, most) for _ in range(ndim)]
    stride = [draw.randint(1, most - 1) for _ in range(ndim)]
    dilation = [draw.choice((1, 1, 2)) for _ in range(ndim)]
    padding = [draw.randint(0, 2) for _ in range(ndim)]
    output_padding = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True)]
    size = [draw.randint(2, 6) for _ in range(ndim)]
    geometry = Geometry(*map(tuple, (kernel, stride, padding, output_padding)), groups, tuple(dilation))
    if min(geometry.output_size(size)) < 1:
        return None
    torch.manual_seed(seed)
    weight = torch.randn(c_in * groups, c_out, *kernel, dtype=torch.float64)
    if draw.random() < 0.3:  # channels_last
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    bias = torch.randn(c_out * groups, dtype=torch.float64) if draw.random() < 0.5 else None
    options = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups, dilation=dilation)
    return torch.randn(2, c_in * groups, *size, dtype=torch.float64), weight, bias, options


@pytest.mark.parametrize("seed", range(40))
def test_random_layers(seed, device):
    if (layer := drawn(seed)) is None:
        pytest.skip("no output")
    x, w, b, options = layer
    expected = ATEN[x.ndim - 2](x, w, b, **options)
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, w, b = (None if t is None else t.to(device, dtype) for t in (x, w, b))
    plan = tconv.explain(x, w, b, **options).passes[0].plan
    actual = TCONV[x.ndim - 2](x, w, b, **options)
    assert errors(actual.cpu(), expected)[1] < (1e-13 if device == "cpu" else 3e-7)
    if device == "cpu":
        assert plan.family == "few", plan


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_halves(dtype, device):
    """Operands are exact in fp32; only the sum is rounded."""
    x = torch.randn(2, 24, 5, 9, device=device).to(dtype)
    w, b = torch.randn(24, 3, 4, 4, device=device).to(dtype), torch.randn(3, device=device).to(dtype)
    exact = torch.nn.functional.conv_transpose2d(x.double(), w.double(), b.double(), 2, 1)
    actual = tconv.conv_transpose2d(x, w, b, 2, 1)
    eps = torch.finfo(dtype).eps * (2 if device == "cpu" and dtype is torch.bfloat16 else 1)  # there it truncates
    assert ((actual.double() - exact).abs() <= eps / 2 * exact.abs() * 1.01 + 1e-5).all()


@pytest.mark.parametrize("tf32", (False, True))
@pytest.mark.parametrize("c_in, kernel, stride", [(150, 4, 2), (9, 9, 2), (70, 3, 1)])
def test_long_sums_in_fp32(c_in, kernel, stride, tf32, device):
    """Sums of hundreds of products, in blocks: a plain chain of 600 would be 4.5e-7 off in root mean square."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    x, w = torch.randn(2, c_in, 12, 13, device=device), torch.randn(c_in, 1, kernel, kernel, device=device)
    exact = torch.nn.functional.conv_transpose2d(x.double(), w.double(), stride=stride)
    plan = tconv.explain(x, w, stride=stride).passes[0].plan
    if device == "cpu":
        assert plan.family == "few" and plan.config.block > 0
    if plan.family == "few":
        assert errors(tconv.conv_transpose2d(x, w, stride=stride), exact)[1] < 1.7e-7


def chosen(c_in, c_out, kernel, size, batch, half=True, **options):
    *_, geometry = layer(c_in, c_out, kernel, size, batch, **options)
    g = geometry.groups
    return few.choose(geometry, batch, c_in // g, c_out // g, size, half, HOPPER), geometry


def test_tiles():
    """A thread's sums and reads, what is unrolled, and how many programs there are, stay within what they are meant to."""
    for args, options in (
        ((64, 3, 4, (128, 128), 128), dict(stride=2, padding=1)),
        ((56, 1, 9, (540, 960), 1), dict(stride=2, padding=4, output_padding=1)),
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3)),
        ((512, 1, 16, (3999,), 16), dict(stride=8)),
        ((3, 16, 3, (16, 32, 32), 128), dict(stride=2, padding=1)),
        ((384, 384, 2, (32, 32), 64), dict(stride=2, groups=384)),
    ):
        for half in (True, False):
            tile, geometry = chosen(*args, half=half, **options)
            a_thread = tile.pixels // (few.WARPS * few.WARP)
            most = few.SUMS_IN_BLOCKS if tile.block else few.SUMS
            assert a_thread == 1 or (a_thread * tile.sums <= most and a_thread * len(tile.reads) <= few.READS)
            assert not (half and tile.block) and tile.block % tile.unroll == 0
        assert tile.sums <= few.MOST_SUMS and tile.pixels % tile.box == 0
        taps = geometry.axes3[1].kernel * geometry.axes3[2].kernel
        assert sum(len(uses) for _, _, uses in tile.reads) == taps
        assert len({use for _, _, uses in tile.reads for use in uses}) == taps
        assert args[0] // geometry.groups % tile.unroll == 0 and args[1] // geometry.groups % tile.channels == 0
        output = (1,) * (3 - geometry.ndim) + tuple(geometry.output_size(args[3]))
        assert few.programs(tile, geometry, args[4], args[1] // geometry.groups, output) >= 2 * HOPPER.processors


def test_too_few_pixels_are_left():
    assert chosen(529, 2, 4, (6, 7), 8, stride=2, padding=1)[0] is None


@pytest.mark.parametrize(
    "c_in, c_out, how, options, why",
    [
        (64, 3, "tf32", {}, ""),
        (64, 6, "half", {}, "not few channels"),
        (64, 8, "tf32", {}, ""),
        (4, 32, "half", {}, ""),
        (5, 32, "half", {}, "not few channels"),
        (4, 4, "", dict(groups=2), ""),
        (8, 5, "", dict(groups=2), "not few channels"),
        (64, 3, "tf32", dict(large=True), "the few-channel kernel has 32-bit offsets"),
        (64, 3, "tf32", dict(source="vectors"), "the few-channel kernel reads along the width"),
        (64, 1, "tf32", dict(stride=8), "the few-channel kernel would have too many phases or taps"),
    ],
)
def test_which(c_in, c_out, how, options, why):
    options = dict(large=False, source="width", groups=1, stride=2) | options
    stride, groups = options.pop("stride"), options.pop("groups")
    geometry = Geometry((4, 4), (stride, stride), (1, 1), (0, 0), groups, (1, 1))
    assert few.refuse(geometry, c_in, c_out, how=how, **options) == why


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "args, options",
    [
        ((64, 3, 4, (64, 64), 16), dict(stride=2, padding=1)),
        ((56, 1, 9, (270, 480), 1), dict(stride=3, padding=4, output_padding=2)),
        ((90, 5, 4, (136, 241), 2), dict(stride=2, padding=1)),
        ((192, 192, 3, (57, 56), 4), dict(stride=2, padding=1, groups=192)),
        ((64, 128, 5, (17, 20, 21), 4), dict(stride=2, padding=2, groups=64)),
        ((48, 1, 8, (64084,), 2), dict(stride=4)),
        ((3, 16, 3, (16, 32, 32), 16), dict(stride=2, padding=1)),
        ((64, 8, 3, (200, 200), 4), dict(dilation=2)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_on_a_gpu(args, options, dtype, ieee):
    """Layers large enough to take the kernel there, against the oracle and cuDNN; the same bits every time."""
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    x = torch.randn(batch, c_in, *size, device="cuda", dtype=dtype)
    w = torch.randn(c_in, c_out // geometry.groups, *geometry.kernel, device="cuda", dtype=dtype)
    b = torch.randn(c_out, device="cuda", dtype=dtype)
    plan = tconv.explain(x, w, b, **options).passes[0].plan
    if (
        dtype.itemsize == 2
        and geometry.groups == 1
        and few.FEW_OUT["half"] < c_out < few.WITH_FEW_IN
        and c_in > few.FEW_IN
    ):
        pytest.skip("16-bit layers of so many channels take the tensor core")
    assert plan.family == "few"
    aten = ATEN[geometry.ndim]
    exact, peer = aten(x.double(), w.double(), b.double(), **options), aten(x, w, b, **options)
    ours = TCONV[geometry.ndim]
    actual = ours(x, w, b, **options)
    assert_no_worse(actual, exact, peer, str(plan))
    assert torch.equal(actual, ours(x, w, b, **options))
