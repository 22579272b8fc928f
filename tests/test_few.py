"""The few-channel kernels: which problems they take, with which tile, and that these make the convolution."""

import random
from dataclasses import replace

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, passes
from test_aot import layer
from test_passes import TCONV

import tconv
from tconv import dispatch, few, launch
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.problem import PASSES, Problem

HOPPER = Target("cuda", 90, 132)


@pytest.fixture(autouse=True)
def without_columns():
    """They take most forward passes of few output channels."""
    with dispatch.without("columns", "aten"):
        yield


STRIDES = "the few-channel kernels read along the width, or channels in whole vectors"


def drawn(seed, last):
    """A random layer of few channels and its tensors in float64, channels_last or not, or None where it has no output."""
    draw = random.Random(seed)
    ndim = draw.choice((2, 2, 3)) if last else draw.choice((1, 2, 2, 3))
    if last:  # channels side by side: depthwise, or few source channels
        c_in, c_out, groups = draw.choice(((1, 1, 16), (1, 1, 48), (3, 16, 1), (1, 32, 1), (2, 3, 1)))
    elif draw.random() < 0.5:
        c_in, c_out, groups = draw.choice(((1, 8, 1), (4, 12, 1), (8, 1, 1), (3, 3, 1), (20, 5, 1)))
    else:
        c_in, c_out, groups = draw.choice(((1, 1, 3), (2, 3, 3), (8, 16, 2)))
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
    format = {2: torch.channels_last, 3: torch.channels_last_3d}[ndim] if last else torch.contiguous_format
    tensors = [torch.randn(2, c_in * groups, *size), torch.randn(c_in * groups, c_out, *kernel)]
    tensors += [torch.randn(c_out * groups), torch.randn(2, c_out * groups, *geometry.output_size(size))]
    input, weight, bias, grad = (
        t.double().contiguous(memory_format=format) if t.ndim > 1 else t.double() for t in tensors
    )
    if draw.random() < 0.3:
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    options = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups, dilation=dilation)
    return input, weight, bias if draw.random() < 0.5 else None, grad, options


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("seed", range(10))
def test_random_layers(seed, last, device, ieee, monkeypatch):
    """All three passes; on a GPU, too, on layers so small that they would run elsewhere."""
    if (layer := drawn(seed, last)) is None:
        pytest.skip("no output")
    for least in ("PROGRAMS", "LARGE_PROGRAMS", "SHORT_PROGRAMS", "LEAST_WAVES"):
        monkeypatch.setattr(few, least, 0)
    few.choose.cache_clear()
    dispatch.plan.cache_clear()
    launch.record.forget()
    *tensors, options = layer
    expected = passes(ATEN[tensors[0].ndim - 2], *tensors, **options)
    dtype = torch.float64 if device == "cpu" else torch.float32
    tensors = [None if t is None else t.to(device, dtype) for t in tensors]
    actual = passes(TCONV[tensors[0].ndim - 2], *tensors, **options)
    told = [each.plan for each in tconv.explain(*tensors[:3], **options).passes]
    for name, plan, ours, exact in zip(PASSES, told, actual, expected, strict=False):
        if plan.family == "few" or device == "cpu":
            assert errors(ours.cpu(), exact)[1] < (1e-13 if device == "cpu" else 3e-7), name
    assert "few" in [plan.family for plan in told]
    if not last:
        assert told[0].family == "few", told[0]
        if options["groups"] == 3 and expected[0].shape[-1] > 1 and tensors[1].is_contiguous():
            assert told[2].family == "few", told[2]
    if last and options["groups"] > 1:
        assert [(plan.family, plan.config.lanes) for plan in told] == [("few", 16)] * 3


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("size", [(70, 9), (1030,)], ids=str)
def test_several_tiles(size, last, device, monkeypatch):
    """A program has several tiles, one below the other or along the width, and the last part fewer."""
    if device != "cpu" or (last and len(size) == 1):
        pytest.skip("the interpreter's; torch has no channels_last in 1-d")
    monkeypatch.setattr(few, "LEAST_WAVES", 0)
    monkeypatch.setattr(few, "MOST_TILES", 2)
    channels = 16 if last else 2
    x, w = torch.randn(3, channels, *size).double(), torch.randn(channels, 1, *(3 for _ in size)).double()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    options = dict(stride=2, padding=1, groups=channels)
    tile = tconv.explain(x, w, **options).passes[0].plan.config
    geometry = tconv.explain(x, w, **options).geometry
    _, parts, each = few.grid(tile, geometry, 3, 1, size, True, 4)
    assert parts > 1 and each == 2 and tile.across == (len(size) == 1)
    rows, width = 3 * size[0] if len(size) > 1 else 3, size[-1]  # of a phase, as many as the input has
    shared = -(-width // tile.box) if tile.across else -(-rows // (tile.pixels // tile.box))
    assert shared % each == 1
    expected = ATEN[len(size)](x, w, **options)
    assert errors(TCONV[len(size)](x, w, **options), expected)[1] < 1e-13


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
    if device == "cpu" and tf32 and kernel != 9:
        pytest.skip("the interpreter is slow, and computes the same")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    x, w = torch.randn(2, c_in, 12, 13, device=device), torch.randn(c_in, 1, kernel, kernel, device=device)
    exact = torch.nn.functional.conv_transpose2d(x.double(), w.double(), stride=stride)
    plan = tconv.explain(x, w, stride=stride).passes[0].plan
    if device == "cpu":
        assert plan.family == "few" and plan.config.block > 0
    if plan.family == "few":
        assert errors(tconv.conv_transpose2d(x, w, stride=stride), exact)[1] < 1.7e-7


@pytest.mark.parametrize(
    "kernel, stride, width, split",
    [(8, 4, 6, 4), (8, 4, 7, 4), (4, 2, 7, 2), (3, 2, 7, 1), (6, 3, 5, 1)],
    ids=("k8 s4", "k8 s4 odd", "k4 s2", "k3 s2 odd", "k6 s3"),
)
def test_gradients_read_a_stride_apart(kernel, stride, width, split, device):
    """In runs whose parts are sorted, or, of a width that the stride does not divide or another stride, one by one."""
    if device != "cpu":
        pytest.skip("so small a layer runs elsewhere there")
    x, w = torch.randn(2, 3, 4, width, dtype=torch.float64), torch.randn(3, 1, kernel, kernel, dtype=torch.float64)
    options = dict(stride=stride, padding=(kernel - stride) // 2, groups=3)
    expected = passes(ATEN[2], x, w, None, grad := torch.randn_like(ATEN[2](x, w, **options)), **options)
    told = [each.plan for each in tconv.explain(x, w, **options).passes]
    assert [(plan.family, plan.config.split) for plan in told[1:3]] == [("few", split)] * 2
    for ours, exact in zip(passes(TCONV[2], x, w, None, grad, **options), expected, strict=True):
        assert errors(ours, exact)[1] < 1e-13


def chosen(c_in, c_out, kernel, size, batch, half=True, last=False, direction="forward", portable=False, **options):
    *_, geometry = layer(c_in, c_out, kernel, size, batch, **options)
    channels = c_in // geometry.groups, c_out // geometry.groups
    c_src, c_dst = reversed(channels) if direction == "backward_input" else channels
    return few.choose(direction, geometry, batch, c_src, c_dst, size, half, last, HOPPER, portable), geometry


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
            tile, geometry = chosen(*args, half=half, portable=True, **options)
            a_thread = tile.pixels // (few.WARPS * few.WARP)
            most = few.SUMS_IN_BLOCKS if tile.block else few.SUMS
            assert a_thread == 1 or (
                a_thread * tile.sums <= most and a_thread * len(tile.reads) * tile.split <= few.READS
            )
            assert not (half and tile.block) and tile.block % tile.unroll == 0
        assert tile.sums <= few.MOST_SUMS and tile.pixels % tile.box == 0
        taps = geometry.taps if tile.depth == "unrolled" else geometry.axes3[1].kernel * geometry.axes3[2].kernel
        assert sorted(tap for *_, uses in tile.reads for _, tap, _ in uses) == list(range(taps))
        assert tile.depth == ("none" if geometry.ndim < 3 else "unrolled")
        assert args[0] // geometry.groups % tile.unroll == 0 and args[1] // geometry.groups % tile.channels == 0
        c_dst = args[1] // geometry.groups
        assert few.grid(tile, geometry, args[4], c_dst, args[3], True, HOPPER.processors)[0] >= 2 * HOPPER.processors


@pytest.mark.parametrize("half", (True, False))
@pytest.mark.parametrize("direction", PASSES)
def test_tiles_in_channels_last(direction, half):
    """Vectors of 8 or 16 bytes a thread, and a place in registers for each sum."""
    for args, options in (
        ((384, 384, 2, (32, 32), 64), dict(stride=2, groups=384)),
        ((128, 128, 5, (32, 32, 32), 2), dict(stride=2, padding=2, groups=128)),
        ((48, 48, 4, (64, 64), 16), dict(stride=2, padding=1, groups=48)),
    ):
        tile, _ = chosen(*args, half=half, last=True, direction=direction, **options)
        a_thread = tile.pixels * tile.lanes // (few.WARPS * few.WARP)
        assert args[0] % tile.lanes == 0 and tile.lanes >= 16 and a_thread >= 4
        assert a_thread * tile.sums <= few.READS and tile.pixels % tile.box == 0 and tile.own


@pytest.mark.parametrize(
    "size, kernel, tf32, copied",
    [((6, 8), (3, 3), False, True), ((2, 3, 10), (3, 1, 3), False, True), ((6, 7), (3, 3), False, False), ((6, 8), (3, 3), True, False)],
    ids=str,
)  # fmt: skip
def test_channels_last_in_ieee_fp32_is_copied(size, kernel, tf32, copied, device):
    """Images of whole pieces of 16 bytes."""
    n = len(size)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[n]
    x = torch.randn(2, 40, *size, device=device).contiguous(memory_format=form)
    w, b = torch.randn(40, 2, *kernel, device=device), torch.randn(2, device=device)
    with dispatch.without("columns", *dispatch.HOPPER, "aten"):
        chosen = tconv.explain(x, w, b, stride=2).passes[0]
        y = TCONV[n](x, w, b, stride=2)
    if device == "cpu":  # on a GPU these are too few pixels
        assert chosen.plan.arranged == copied and (chosen.plan.family == "few" or not copied)
    assert ("pixels innermost" in str(chosen)) == chosen.plan.arranged
    assert y.is_contiguous(memory_format=form)
    exact = ATEN[n](x.double(), w.double(), b.double(), stride=2)
    assert errors(y, exact)[1] < (1e-3 if tf32 else 1e-6)


@pytest.mark.parametrize(
    "change, copied",
    [({}, True), (dict(tf32=True), False), (dict(dense=False), False), (dict(c_out=7), False), (dict(batch=40), False)],
    ids=str,
)
def test_which_are_copied(change, copied):
    """FSRCNN's x4."""
    batch, c_in, c_out, size, geometry = layer(56, 1, 9, (270, 480), 1, stride=4, padding=4, output_padding=3)
    sizes = "forward", geometry, batch, c_in, c_out, size, torch.float32, False, "channels", "channels"
    chosen = dispatch.plan(replace(Problem(*sizes, dense=True), **change), HOPPER)
    assert (chosen.family == "few" and chosen.arranged) == copied, chosen


@pytest.mark.parametrize(
    "size, c_in, parts, bias",
    [((5, 7), 50, 3, True), ((5, 7), 34, 2, False), ((9,), 37, 2, True), ((2, 3, 4), 33, 2, True)],
)
def test_sums_in_parts(size, c_in, parts, bias, device, ieee):
    """Where programs are few each takes a part of the source channels; the first of them adds the bias."""
    n = len(size)
    x, w = torch.randn(2, c_in, *size, device=device), torch.randn(c_in, 3, *(3,) * n, device=device)
    b = torch.randn(3, device=device) if bias else None
    with dispatch.without("columns", *dispatch.HOPPER, "aten"):
        chosen = tconv.explain(x, w, b, stride=2, padding=1).passes[0].plan
        y = TCONV[n](x, w, b, stride=2, padding=1)
    if device == "cpu":  # on a GPU these are too few pixels
        assert (chosen.family, chosen.splits) == ("few", parts)
    exact = ATEN[n](x.double(), w.double(), None if b is None else b.double(), stride=2, padding=1)
    assert errors(y, exact)[1] < 5e-7


@pytest.mark.parametrize(
    "args, options, parts",
    [
        ((150, 5, 4, (136, 240), 1), dict(stride=2, padding=1), 3),
        ((192, 3, 5, (256, 384), 1), dict(stride=2, padding=2, output_padding=1), 3),
        ((112, 3, 5, (64, 64), 12), dict(stride=2, padding=1), 4),
        ((128, 3, 5, (128, 128), 1), dict(stride=2, padding=1), 8),
        ((64, 3, 4, (32, 32), 64), dict(stride=2, padding=1), 0),  # the column kernels'
        ((64, 8, 4, (16, 16), 64), dict(stride=2, padding=1), 0),
        ((56, 1, 9, (270, 480), 1), dict(stride=4, padding=4, output_padding=3), 1),
    ],
)
def test_parts_fill_the_gpu(args, options, parts):
    """In IEEE fp32, and there alone."""
    batch, c_in, c_out, size, geometry = layer(*args, **options)
    problem = Problem("forward", geometry, batch, c_in, c_out, size, torch.float32, False, "width")
    plan = dispatch.plan(problem, HOPPER)
    assert (plan.family, plan.splits) == ("few", parts) if parts else plan.family != "few"
    assert parts == 1 or dispatch.plan(replace(problem, tf32=True), HOPPER).family != "few"


def test_too_few_pixels_are_left():
    assert chosen(529, 2, 4, (6, 7), 8, stride=2, padding=1)[0] is None


@pytest.mark.parametrize(
    "c_in, c_out, how, options, why",
    [
        (64, 3, "tf32", {}, ""),
        (64, 5, "tf32", {}, "not few channels"),
        (64, 6, "half", {}, "not few channels"),
        (64, 8, "ieee", {}, ""),
        (4, 32, "half", {}, ""),
        (5, 32, "half", {}, "not few channels"),
        (4, 4, "", dict(groups=2), ""),
        (32, 5, "", dict(groups=2), "not few channels"),
        (8, 5, "half", dict(groups=2, direction="backward_weight"), "not few channels"),
        (8, 5, "tf32x3", dict(groups=2, direction="backward_weight"), ""),
        (4, 4, "half", dict(direction="backward_weight"), "not few channels"),
        (3, 64, "half", dict(direction="backward_input"), "not few channels"),
        (16, 3, "half", dict(direction="backward_input"), ""),
        (64, 3, "half", dict(), "not few channels"),
        (64, 3, "half", dict(portable=True), ""),
        (64, 3, "tf32", dict(large=True), "the few-channel kernels have 32-bit offsets"),
        (64, 3, "tf32", dict(source="vectors"), STRIDES),
        (3, 32, "half", dict(source="channels", whole=(False, True)), ""),
        (2, 2, "tf32", dict(source="channels", destination="channels"), ""),
        (2, 2, "tf32", dict(source="channels", direction="backward_input"), ""),
        (5, 2, "tf32", dict(source="channels", destination="channels"), STRIDES),
        (1, 1, "", dict(groups=16, source="channels", whole=(True, True)), ""),
        (1, 1, "", dict(groups=16, source="channels", whole=(True, False)), STRIDES),
        (2, 2, "", dict(groups=16, source="channels", whole=(True, True)), "several channels a group in channels_last"),
        (64, 1, "tf32", dict(stride=8), "the few-channel kernels would have too many phases or taps"),
        (32, 1, "tf32", dict(stride=8, direction="backward_input"), ""),
    ],
)
def test_which(c_in, c_out, how, options, why):
    """c_in and c_out are the source's and the destination's."""
    options = dict(large=False, source="width", destination="width", whole=(False, False), groups=1, stride=2) | options
    stride, groups, direction = options.pop("stride"), options.pop("groups"), options.pop("direction", "forward")
    geometry = Geometry((4, 4), (stride, stride), (1, 1), (0, 0), groups, (1, 1))
    assert few.refuse(direction, geometry, c_in, c_out, how=how, **options) == why


@pytest.mark.gpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "args, options",
    [
        ((64, 3, 4, (64, 64), 64), dict(stride=2, padding=1)),
        ((56, 1, 9, (270, 480), 1), dict(stride=3, padding=4, output_padding=2)),
        ((192, 192, 3, (57, 56), 4), dict(stride=2, padding=1, groups=192)),
        ((64, 64, 5, (17, 20, 21), 4), dict(stride=2, padding=2, groups=64)),
        ((64, 128, 3, (17, 20, 21), 4), dict(stride=2, padding=2, groups=64)),
        ((48, 1, 8, (64084,), 8), dict(stride=4)),
        ((96, 96, 12, (8202,), 4), dict(stride=2, padding=5, groups=96)),
        ((64, 64, 4, (32, 32), 16), dict(stride=2, padding=1, groups=64)),
        ((3, 16, 3, (16, 32, 32), 16), dict(stride=2, padding=1)),
        ((32, 64, 3, (64, 96), 4), dict(stride=(2, 3), padding=1, groups=4)),
        ((64, 3, 3, (200, 200), 4), dict(dilation=2)),
        ((2, 2, 4, (48, 64), 8), dict(stride=2, padding=1)),
        ((150, 5, 4, (136, 240), 1), dict(stride=2, padding=1)),
        ((192, 3, 5, (250, 380), 1), dict(stride=2, padding=2, output_padding=1)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_on_a_gpu(args, options, dtype, last, ieee):
    """Layers large enough to take the kernels there, against the oracle and cuDNN; the same bits every time."""
    batch, c_in, c_out, size, geometry = layer(*args, **{k: v for k, v in options.items() if k != "stride"})
    stride = options.get("stride", 1)
    geometry = replace(geometry, stride=stride if isinstance(stride, tuple) else (stride,) * len(size))
    if last and geometry.ndim == 1:
        pytest.skip("torch has no channels_last in 1-d")
    format = {2: torch.channels_last, 3: torch.channels_last_3d}[geometry.ndim] if last else torch.contiguous_format
    like = dict(device="cuda", dtype=dtype)
    x = torch.randn(batch, c_in, *size, **like).contiguous(memory_format=format)
    w = torch.randn(c_in, c_out // geometry.groups, *geometry.kernel, **like)
    b = torch.randn(c_out, **like)
    grad = torch.randn(batch, c_out, *geometry.output_size(size), **like).contiguous(memory_format=format)
    families = [each.plan.family for each in tconv.explain(x, w, b, **options).passes]
    if geometry.groups == c_in == c_out:
        assert families[:3] == ["few"] * 3
    elif not last and (geometry.groups > 1 or dtype is torch.float32 or min(c_in, c_out) <= few.FEW_OUT["half"]):
        assert families[0] == "few"
    aten, ours = ATEN[geometry.ndim], TCONV[geometry.ndim]
    exact = passes(aten, x.double(), w.double(), b.double(), grad.double(), **options)
    peer = passes(aten, x, w, b, grad, **options)
    actual, again = (passes(ours, x, w, b, grad, **options) for _ in range(2))
    for name, family, *each in zip(PASSES, families, actual, exact, peer, again, strict=False):
        assert_no_worse(*each[:3], f"{name}, {family}")
        assert torch.equal(each[0], each[3]), name
