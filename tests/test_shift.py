"""The shift kernel: its tiles carried out in plain torch on the CPU, and the kernel itself on a Hopper GPU."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from oracle import ATEN, assert_no_worse

import tconv
from tconv import shift
from tconv.configs import Target
from tconv.dispatch import Problem, plan
from tconv.geometry import Geometry
from tconv.workloads import SUITES, layers

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TARGET = Target("cuda", 90, 132, (3, 6))


def pair(v):
    return (v, v) if isinstance(v, int) else tuple(v)


def geometry(kernel, stride=1, padding=0, output_padding=0, dilation=1):
    kernel, stride, padding, output_padding, dilation = map(pair, (kernel, stride, padding, output_padding, dilation))
    return Geometry(kernel, stride, padding, output_padding, 1, dilation)


def carried_out(tile: shift.Shift, g: Geometry, x, w):
    """What the kernel computes with this tile, step by step; what it must not depend on is NaN."""
    batch, c_in, *size = x.shape
    output = g.output_size(size)
    c_out = w.shape[1]
    walked = shift.walk(tile, g.axes, batch, c_in, c_out, size, output, 132)
    assert walked.tiles_co == -(-c_out // shift.CO) and walked.blocks == -(-c_in // tile.kb)
    y = torch.full((batch, c_out, *output), torch.nan, dtype=x.dtype)
    written = torch.zeros_like(y, dtype=torch.int64)
    phases = range(tile.stride_h)
    spatial = walked.tiles // walked.tiles_co // len(tile.low)
    for at, index in itertools.product(range(spatial), range(len(tile.low))):
        tile_w, row = at % walked.tiles_w, at // walked.tiles_w * tile.rows
        first = row + tile.low[index]
        stage = torch.full((tile.ring, c_in), torch.nan, dtype=x.dtype)
        for p in range(tile.halo_rows * tile.box):
            v, column = first + p // tile.box, tile_w * tile.useful + tile.low_w + p % tile.box
            n, h = int(v / walked.image), v - int(v / walked.image) * walked.image  # as C divides
            inside = 0 <= n < batch and 0 <= h < size[0] and 0 <= column < size[1]
            stage[p] = x[n, :, h, column] if inside else 0
        for a in phases if tile.all_phases else (index,):
            for consumer in range(2 if tile.shared else 1):
                acc = torch.zeros(tile.stride_w, c_out, tile.pixels, dtype=x.dtype)
                for b, tap, offset in tile.taps[a]:
                    start = consumer * tile.pixels + offset
                    seen = stage[start : start + tile.pixels]
                    assert seen.shape[0] == tile.pixels
                    acc[b] += w.flatten(2)[:, :, tap].T @ seen.T
                for b, p in itertools.product(range(tile.stride_w), range(tile.pixels)):
                    r, column = divmod(consumer * tile.pixels + p, tile.box)
                    n, q = divmod(row + r, walked.image)
                    oh, ow = q * tile.stride_h + a, (tile_w * tile.useful + column) * tile.stride_w + b
                    if r < tile.rows and column < tile.useful and n < batch and oh < output[0] and ow < output[1]:
                        y[n, :, oh, ow] = acc[b, :, p]
                        written[n, :, oh, ow] += 1
    assert (written == 1).all(), "every output is written once"
    return y


GEOMETRIES = {
    "k4s2p1": geometry(4, 2, 1),
    "k3s2p1op1": geometry(3, 2, 1, 1),
    "k5s2p2": geometry(5, 2, 2),
    "k2s2": geometry(2, 2),
    "k1s2": geometry(1, 2, 0, 1),
    "k3p1": geometry(3, 1, 1),
    "k3x5d2": geometry((3, 5), 1, (0, 3), 0, (2, 1)),
    "k3s2d2": geometry(3, 2, 1, 1, 2),
    "k3s4x2p5": geometry(3, (4, 2), (5, 1), (2, 0)),
    "k8x1s4x1": geometry((8, 1), (4, 1)),
    "row": geometry((1, 4), (1, 2), (0, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_tiles_make_the_convolution(name, dtype):
    """Every kind of tile that may be chosen, of any width, one for both consumers or one each, all phases or one."""
    g = GEOMETRIES[name]
    size = (1 if name == "row" else 3, 9)
    x, w = torch.randn(2, 20, *size, dtype=torch.float64), torch.randn(20, 3, *g.kernel, dtype=torch.float64)
    exact = ATEN[2](x, w, stride=g.stride, padding=g.padding, output_padding=g.output_padding, dilation=g.dilation)
    kinds = set()
    for source, vector in (("width", 1), ("width", 2), ("channels", 1)):
        by_tma = source == "channels" and dtype == "bf16"
        columns = -(-exact.shape[3] // g.stride[1])
        for candidate in shift.candidates(g.axes, dtype, columns, 20, by_tma, vector):
            tile = shift.make(g.axes, dtype, 20, *candidate, source, "width", vector, 4)
            # One tile of each kind: the CPU carries them out pixel by pixel.
            if tile is None or (kind := (source, vector, tile.shared, tile.all_phases, tile.box == 16)) in kinds:
                continue
            kinds.add(kind)
            torch.testing.assert_close(carried_out(tile, g, x, w), exact)
    assert len(kinds) > 2


@pytest.mark.parametrize("suite", SUITES)
def test_tiles_fit(suite):
    """Every tile chosen for the suites fits the shared memory and has the stages without which the kernel would hang."""
    chosen = 0
    for layer in layers(suite):
        for dtype, source in itertools.product((torch.float32, torch.bfloat16), ("width", "vectors")):
            shape = layer.input_shape
            sizes = layer.geometry, shape[0], shape[1], layer.out_channels, shape[2:]
            problem = Problem("forward", *sizes, dtype, True, source, source, 16 if source == "vectors" else 1)
            tile = plan(problem, TARGET).config
            if not isinstance(tile, shift.Shift):
                continue
            chosen += 1
            joined = tile.stride_w if tile.dst_layout == "width" else 1
            blocks = -(-layer.in_channels // tile.kb)
            rows = tile.ring + tile.slots * shift.CO
            assert (rows * tile.kb + 2 * shift.CO * tile.chunk * joined) * tile.size <= shift.SHARED
            assert tile.ring >= tile.stages * tile.pitch >= tile.stages * tile.halo_rows * tile.box
            held = tile.all_phases and (tile.stride_h > 1 or not tile.shared)
            assert tile.stages >= (blocks + 1 if held else 2)
            assert tile.shared or (tile.resident and tile.all_phases)
            assert tile.pixels * tile.stride_w <= 256
            assert not tile.resident or tile.slots == tile.taps_all * blocks
    assert chosen > 50


@pytest.mark.parametrize(
    ("change", "why"),
    (
        (dict(target=Target("cuda", 80, 108)), "the shift kernel is for sm_90"),
        (dict(target=Target("cuda", 90, 132, (3, 10))), "the shift kernel was not tried with Triton 3.10"),
        (dict(geometry=geometry(5, 3)), "the shift kernel has strides up to 2 along the width"),
        (dict(large=True), "the shift kernel has 32-bit offsets"),
        (dict(tf32=False), "the shift kernel has no tf32x3 yet"),
        (dict(c_out=16), "few channels"),
        (dict(source="strided"), "of the tensors' strides"),
        (dict(source="vectors", vector=4), "the input is not aligned to 16 bytes"),
        (dict(batch=1, c_out=64, input_size=(2, 2)), "too small for the shift kernel's tiles"),
    ),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_left_to_the_portable_kernels_and_why(change, why):
    facts = dict(geometry=geometry(4, 2, 1), batch=16, c_in=64, c_out=64, input_size=(64, 64), target=TARGET)
    facts |= dict(dtype=torch.float32, tf32=True, source="width") | change
    target = facts.pop("target")
    chosen = plan(Problem("forward", **facts), target)
    assert chosen.family == "gemm" and chosen.reason.endswith(f"; {why}")


@dataclass
class Case:
    id: str
    input: tuple
    weight: tuple
    layer: dict = field(default_factory=dict)


CASES = (
    Case("k4s2", (16, 64, 65, 80), (64, 64, 4, 4), dict(stride=2, padding=1)),
    Case("k4s2_streamed", (24, 512, 17, 16), (512, 192, 4, 4), dict(stride=2, padding=1)),
    Case("k3s2", (40, 96, 63, 33), (96, 80, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Case("k5s2", (16, 208, 40, 48), (208, 64, 5, 5), dict(stride=2, padding=2, output_padding=1)),
    Case("k2s2", (32, 128, 59, 62), (128, 48, 2, 2), dict(stride=2)),
    Case("k3", (20, 64, 75, 59), (64, 64, 3, 3), dict(padding=1)),
    Case("k3x5_dilated", (24, 32, 80, 52), (32, 64, 3, 5), dict(padding=(0, 3), dilation=(2, 1))),
    Case("s4x1", (16, 96, 40, 100), (96, 48, 8, 1), dict(stride=(4, 1))),
    Case("1d_k4s2", (8, 128, 6001), (128, 64, 4), dict(stride=2, padding=1)),
    Case("1d_k3", (6, 64, 16383), (64, 96, 3)),
    Case("narrow", (400, 256, 4, 4), (256, 256, 4, 4), dict(stride=2, padding=1)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_cases_take_the_shift_kernel(case):
    """By the plan for a Hopper GPU: what the next test runs there is this kernel."""
    ndim = len(case.input) - 2
    values = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1} | case.layer
    values = {k: (v,) * ndim if isinstance(v, int) else v for k, v in values.items()}
    g = Geometry(case.weight[2:], values["stride"], values["padding"], values["output_padding"], 1, values["dilation"])
    for dtype, source in itertools.product((torch.float32, torch.float16, torch.bfloat16), ("width", "vectors")):
        sizes = case.input[0], case.input[1], case.weight[1], case.input[2:]
        vector = 16 if source == "vectors" else 1
        for destination in {source, "vectors" if ndim == 2 else "width"}:
            problem = Problem("forward", g, *sizes, dtype, True, source, destination, vector)
            assert plan(problem, TARGET).family == "shift", (dtype, source, destination)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("precision", ("tf32", "float16", "bfloat16"))
def test_on_the_gpu(case, precision):
    """Against the oracle, in each combination of memory formats, and the same bits every time."""
    ndim = len(case.input) - 2
    dtype = getattr(torch, precision, torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    function = (tconv.conv_transpose1d, tconv.conv_transpose2d)[ndim - 1]
    x = torch.randn(case.input, device="cuda", dtype=dtype)
    w = torch.randn(case.weight, device="cuda", dtype=dtype) / case.input[1] ** 0.5
    bias = torch.randn(case.weight[1], device="cuda", dtype=dtype)
    exact = ATEN[ndim](x.double(), w.double(), bias.double(), **case.layer)
    peer = ATEN[ndim](x, w, bias, **case.layer)
    contiguous, last = torch.contiguous_format, torch.channels_last
    for x_format, w_format in itertools.product((contiguous, last) if ndim == 2 else (contiguous,), repeat=2):
        inputs = x.contiguous(memory_format=x_format), w.contiguous(memory_format=w_format)
        assert tconv.explain(*inputs, bias, **case.layer).passes[0].plan.family == "shift"
        y = function(*inputs, bias, **case.layer)
        assert_no_worse(y, exact, peer, f"{x_format} {w_format}")
        assert all(torch.equal(y, function(*inputs, bias, **case.layer)) for _ in range(3))
        assert_no_worse(function(*inputs, **case.layer), exact - bias.double().view(-1, *(1,) * ndim), peer, "no bias")
