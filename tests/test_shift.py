"""The shift kernel: its tiles carried out in plain torch on the CPU, and the kernel itself on a Hopper GPU."""

import itertools
from dataclasses import dataclass, field, replace
from math import gcd, prod

import pytest
import torch
from oracle import ATEN, assert_no_worse, round_tf32

import tconv
from tconv import dispatch, layouts, shift
from tconv.configs import Target
from tconv.dispatch import plan
from tconv.geometry import Geometry, sizes3
from tconv.launches import weights
from tconv.problem import Problem
from tconv.problem import precision as precision_of
from tconv.record import Record
from tconv.workloads import SUITES, layers

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
OTHERS = "few", "columns", "blocks"  # which take layers of few output channels, and of kernel = stride
TARGET = Target("cuda", 90, 132, (3, 6), OTHERS)


@pytest.fixture(autouse=True)
def alone():
    with dispatch.without(*OTHERS, "aten"):
        yield


def geometry(ndim, kernel, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    """A Geometry of ndim axes from ints and tuples."""
    values = ((v,) * ndim if isinstance(v, int) else v for v in (kernel, stride, padding, output_padding, dilation))
    kernel, stride, padding, output_padding, dilation = values
    return Geometry(kernel, stride, padding, output_padding, groups, dilation)


def blocks_of(tile: shift.Shift, g: Geometry, w):
    """The packed weight of one tile of output channels: a block [M, input channels] for each tap of depth and height and
    each tap, or folded offset, along the width."""
    _, height, width = g.axes3
    w = w.reshape(*w.shape[:2], -1, height.kernel, width.kernel)
    f = tile.fold
    spans = [(a, low + i) for a, (low, n) in enumerate(zip(f.low, f.count, strict=True)) for i in range(n)]
    found = []
    for kd, kh in itertools.product(range(w.shape[2]), range(height.kernel)):
        if f.phases == 1:
            found += [w[:, :, kd, kh, kw].T for kw in range(width.kernel)]
            continue
        for accumulator, offset in spans:
            block = torch.zeros(w.shape[1], f.phases, w.shape[0], dtype=w.dtype)
            for row in range(f.many[accumulator]):
                for kw, d in width.taps(f.first[accumulator] + row):
                    if d == offset:
                        block[:, row] = w[:, :, kd, kh, kw].T
            found.append(block.flatten(0, 1))
    return found


def carried_out(tile: shift.Shift, g: Geometry, x, w):
    """What the kernel computes with this tile, step by step; what it must not depend on is NaN."""
    batch, c_in, *size = x.shape
    c_out, output = w.shape[1], g.output_size(size)
    shape = batch, c_out, *output
    size, output = ((1,) * (3 - len(s)) + tuple(s) for s in (size, output))
    images, x = x, x.reshape(batch, c_in, *size)
    walked = shift.walk(tile, g.axes3, batch, c_in, c_out, size, output, 132)
    assert tile.volume or (walked.planes == 1 and tile.depth.taps(0) == [(0, 0)])  # without, the kernel knows no planes
    f = tile.fold
    assert walked.tiles_co == -(-c_out // f.of_tile) and walked.blocks == -(-c_in // tile.kb)
    if walked.tiles_co > 1:  # each by itself
        firsts = range(0, c_out, f.channels)
        return torch.cat([carried_out(tile, g, images, w[:, c : c + f.channels]) for c in firsts], 1)
    parts = [(x, w)]
    if tile.parts == 2:
        x_high, w_high = x.float().double(), w.float().double()
        parts = [(x_high, w_high), (x - x_high, w - w_high)]
    packed = [block for _, part in parts for block in blocks_of(tile, g, part)]
    y = torch.full((batch, c_out, *output), torch.nan, dtype=x.dtype)
    written = torch.zeros_like(y, dtype=torch.int64)
    phases = range(tile.height.stride)
    spatial = walked.tiles // len(tile.low) // tile.depth.stride
    for at, index, phase_d in itertools.product(range(spatial), range(len(tile.low)), range(tile.depth.stride)):
        tile_w, row = at % walked.tiles_w, at // walked.tiles_w * tile.rows
        sums: dict = {}
        readings = [(tap, delta, tile.low[index]) for tap, delta in tile.depth.taps(phase_d)]
        if tile.by_row:
            rows = tile.height.taps(index)
            readings = [(tap * g.axes3[1].kernel + kh, delta, d) for tap, delta, _ in readings for kh, d in rows]
        for tap, delta, low in readings:
            stage = torch.full((tile.ring, c_in), torch.nan, dtype=x.dtype)
            for p in range(tile.halo_rows * tile.of_copy):
                if tile.strip:  # of a copy with zeros behind each row, plane and image
                    v, column = divmod(row + low * tile.box + tile.low_w + p, tile.box)
                else:
                    v, column = row + low + p // tile.box, tile_w * tile.useful + tile.low_w + p % tile.box
                m, h = divmod(v, walked.image)
                n, d = m // walked.planes, m % walked.planes + delta
                if tile.strip:
                    n, d = divmod(m + delta, walked.planes)
                inside = 0 <= n < batch and 0 <= d < size[0] and h < size[1] and 0 <= column < size[2]
                for i, (part, _) in enumerate(parts):
                    stage[i * tile.part + p] = part[n, :, d, h, column] if inside else 0
            for a in phases if tile.all_phases else (index,):
                acc = sums.setdefault(a, torch.zeros(f.accumulators, c_out * f.phases, tile.of_tile, dtype=x.dtype))
                first = tile.height.taps(a)[0][0] if tile.alike else 0
                base = (tap if tile.by_row else tap * tile.height.kernel + first) * tile.blocks_w
                for accumulator, block, offset in tile.taps[min(a, len(tile.taps) - 1)]:
                    seen = stage[offset : offset + tile.of_tile]
                    assert seen.shape[0] == tile.of_tile
                    acc[accumulator] += packed[base + block] @ seen.T
                    if tile.parts == 2:
                        second = stage[tile.part + offset : tile.part + offset + tile.of_tile]
                        acc[accumulator] += packed[base + block] @ second.T
                        acc[accumulator] += packed[base + block + tile.whole] @ seen.T
        for a in phases if tile.all_phases else (index,):
            for p in range(tile.of_tile):
                r, column = divmod(row + p if tile.strip else p, tile.box)
                m, q = divmod(r if tile.strip else row + r, walked.image)
                n, od = m // walked.planes, m % walked.planes * tile.depth.stride + phase_d
                oh = q * tile.height.stride + a
                if not (
                    (tile.strip or r < tile.rows)
                    and column < tile.useful
                    and n < batch
                    and od < output[0]
                    and oh < output[1]
                ):
                    continue
                for b in range(tile.stride_w):
                    ow = (tile_w * tile.useful + column) * tile.stride_w + b
                    if ow < output[2]:
                        acc = sums.get(a)
                        accumulator = sum(first <= b for first in f.first) - 1
                        rows = slice(b - f.first[accumulator], None, f.phases)
                        y[n, :, od, oh, ow] = 0 if acc is None else acc[accumulator, rows, p]
                        written[n, :, od, oh, ow] += 1
    assert (written == 1).all(), "every output is written once"
    return y.reshape(shape)


GEOMETRIES = {
    "k4s2p1": geometry(2, 4, 2, 1),
    "k3s2p1op1": geometry(2, 3, 2, 1, 1),
    "k5s2p2": geometry(2, 5, 2, 2),
    "k2s2": geometry(2, 2, 2),
    "k1s2": geometry(2, 1, 2, 0, 1),
    "k3p1": geometry(2, 3, 1, 1),
    "k1": geometry(2, 1),
    "k3x2s2x1": geometry(2, (3, 2), (2, 1), (1, 0)),
    "k3x5d2": geometry(2, (3, 5), 1, (0, 3), 0, (2, 1)),
    "k3s2d2": geometry(2, 3, 2, 1, 1, 2),
    "k3s4x2p5": geometry(2, (3, 4), (4, 2), (5, 1), (2, 0)),
    "k8x1s4x1": geometry(2, (8, 1), (4, 1)),
    "k7x5p3x1": geometry(2, (7, 5), 1, (3, 1)),
    "k9x4s9x2": geometry(2, (9, 4), (9, 2), (0, 1), (3, 0)),
    "k7x5s2d3x1": geometry(2, (7, 5), 2, 1, 0, (3, 1)),
    "k5s5op2": geometry(2, (1, 5), (1, 5), 0, (0, 2)),
    "k6s3p3op2": geometry(2, (1, 6), (1, 3), (0, 3), (0, 2)),
    "1d_k4s2": geometry(1, 4, 2, 1),
    "1d_k16s8": geometry(1, 16, 8, 4),
    "1d_k14s7": geometry(1, 14, 7, 0, 1),
    "1d_k14s7p4": geometry(1, 14, 7, 4, 1),
    "1d_k12s6p1": geometry(1, 12, 6, 1),
    "1d_k11s5p3": geometry(1, 11, 5, 3),
    "1d_k7s3p2": geometry(1, 7, 3, 2),
    "1d_k64s32p4": geometry(1, 64, 32, 4),
    "1d_k80s20p3": geometry(1, 80, 20, 3),
    "1d_k96s96": geometry(1, 96, 96),
    "1d_k256s128": geometry(1, 256, 128),
    "k34s17p1": geometry(2, (2, 34), (2, 17), (0, 1)),
    "k5s3p1": geometry(2, 5, 3, 1),
    "1d_k5s4": geometry(1, 5, 4, 0, 1),
    "k3x9s1x4p1": geometry(2, (3, 9), (1, 4), (0, 1)),
    "k6s3p2": geometry(2, 6, 3, 2, 1),
    "3d_k3s2p1op1": geometry(3, 3, 2, 1, 1),
    "3d_k1x3x3": geometry(3, (1, 3, 3), (1, 2, 1), (0, 1, 1)),
    "3d_k3x7x5s2x2x1": geometry(3, (3, 7, 5), (2, 2, 1), (1, 3, 2), (1, 0, 0)),
    "3d_k3": geometry(3, (3, 1, 3), 1, (1, 0, 2)),
    "3d_k2s3": geometry(3, (2, 1, 2), (3, 1, 2), 0, (2, 0, 0)),
    "5x7s4x1d2x1": geometry(2, (5, 7), (4, 1), 0, 0, (2, 1)),
    "3d_k3d2": geometry(3, (3, 1, 1), (2, 1, 1), (1, 0, 0), (1, 0, 0), (3, 1, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", ("tf32", "tf32x3", "bf16"))
def test_tiles_make_the_convolution(name, dtype):
    """Every kind of tile that may be chosen, of any width, however the warps share it, all phases or one."""
    g = GEOMETRIES[name]
    size = {1: (9,), 2: (3, 9), 3: (3, 2, 5)}[g.ndim]
    x, w = torch.randn(2, 20, *size, dtype=torch.float64), torch.randn(20, 3, *g.kernel, dtype=torch.float64)
    where = dict(stride=g.stride, padding=g.padding, output_padding=g.output_padding, dilation=g.dilation)
    exact = ATEN[g.ndim](x, w, **where)
    kinds = set()
    apart = shift.apart(g.axes3, sizes3(x.shape[2:]), sizes3(exact.shape[2:]))[2]
    for source, vector, how in (
        ("width", 2, "threads"),
        ("width", 2, "staged"),
        ("channels", 1, "staged" if dtype == "tf32x3" else "bulk"),
        *([] if dtype == "tf32x3" else [("channels", 1, "strip")]),
    ):
        columns = -(-exact.shape[-1] // g.stride[-1])
        strip = apart if how == "strip" else 0
        for candidate in shift.candidates(g.axes3, dtype, columns, 20, 3, "bulk" if strip else how, vector, strip):
            tile = shift.make(g.axes3, dtype, 20, 3, *candidate, source, "width", vector, 4, g.ndim == 3)
            # One tile of each kind: the CPU carries them out pixel by pixel.
            if tile is None:
                continue
            kind = source, how, tile.work, tile.all_phases, tile.by_row, tile.fold.phases, tile.fold.accumulators
            if kind in kinds:
                continue
            kinds.add(kind)
            torch.testing.assert_close(carried_out(tile, g, x, w), exact)
    empty = any(not axis.taps(a) for axis in g.axes3[:2] for a in range(axis.stride))  # rules tiles out
    if g.stride[-1] <= 16:
        assert len(kinds) > (0 if empty else 2)
    else:  # few ways have the registers
        assert kinds or dtype == "tf32x3"


def test_folded_phases_read_the_same_inputs():
    """A zero weight would make an infinity that a phase does not read a NaN in it."""
    for kernel, stride, padding, dilation, exact in (
        (16, 8, 4, 1, True),
        (8, 4, 2, 1, True),
        (6, 3, 0, 1, True),
        (6, 3, 2, 1, True),
        (14, 7, 4, 1, True),
        (12, 6, 1, 1, True),
        (20, 10, 1, 1, True),
        (7, 3, 2, 1, True),
        (11, 5, 3, 1, True),
        (3, 5, 1, 2, False),
        (5, 7, 0, 3, False),
    ):
        axes = geometry(1, kernel, stride, padding, 0, dilation).axes3
        candidates = list(shift.candidates(axes, "bf16", 400, 64, 64, "bulk", 1))
        tiles = [shift.make(axes, "bf16", 64, 64, *each, "channels", "width", 8, 1, False) for each in candidates]
        assert any(tiles) == exact, (kernel, stride, padding, dilation)


@pytest.mark.parametrize("format", ("contiguous", "channels_last", "strided"))
@pytest.mark.parametrize("dtype", ("tf32", "tf32x3"))
@pytest.mark.parametrize(
    "name",
    ("k5s5op2", "k6s3p3op2", "1d_k16s8", "1d_k14s7", "1d_k14s7p4", "1d_k12s6p1", "1d_k11s5p3", "k3x9s1x4p1", "k6s3p2"),
)
def test_packed_weights_of_folded_phases(name, dtype, format, device):
    """The kernel that packs them against the definition, for several tiles of output channels and ragged ones."""
    g = GEOMETRIES[name]
    weight = laid_out(torch.randn(20, 37, *g.kernel, device=device), format)
    checked = 0
    for candidate in shift.candidates(g.axes3, dtype, 64, 20, 37, "threads", 1):
        tile = shift.make(g.axes3, dtype, 20, 37, *candidate, "width", "width", 1, 1, g.ndim == 3)
        if tile is None or tile.box != 64 or tile.pixels != 64:
            continue
        packed = weights.pack_folded(Record(weight), weight, g, tile).cpu()
        taps, _, channels = packed.shape
        high = round_tf32(weight.cpu())
        parts = [high, round_tf32(weight.cpu() - high)][: tile.parts]
        expected = torch.zeros(taps, -(-37 // tile.fold.channels) * tile.fold.channels * tile.fold.phases, channels)
        for block, values in enumerate(block for part in parts for block in blocks_of(tile, g, part)):
            expected[block, : values.shape[0], :20] = values
        # Rows of phases that do not exist are left open.
        f = tile.fold.phases
        there = torch.zeros_like(expected, dtype=torch.bool)
        for block, ones in enumerate(blocks_of(tile, g, torch.ones_like(high)) * tile.parts):
            there[block] = ones[:f].any(1).repeat(expected.shape[1] // f)[:, None]
        assert torch.equal(packed[there], expected[there])
        checked += 1
    assert checked


def laid_out(weight, format):
    """The same values in another memory format, 1-d weights' by hand; "strided": with gaps."""
    if format == "channels_last":
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack((weight, weight), -1)[..., 0] if format == "strided" else weight


@pytest.mark.parametrize("c_out", (64, 70))
@pytest.mark.parametrize("format", ("contiguous", "channels_last", "strided"))
@pytest.mark.parametrize("parts", (0, 1, 2))
def test_packed_weights(parts, format, c_out, device):
    """Each tap's block, and those of the second parts behind them all; for channels that are no power of two."""
    weight = laid_out(torch.randn(41, c_out, 3, 2, device=device), format)
    w_i, w_o, *taps = layouts.strides5(weight)
    order = {"contiguous": "taps"}.get(format, format.replace("channels_last", "channels"))
    assert layouts.order_of(w_o, taps, c_out, (3, 2)) == order
    packed = weights.pack(Record(weight), weight, (0, w_i, w_o), taps, 1, 41, c_out, shift.M, 16, parts).cpu()
    high = round_tf32(weight.cpu())
    expected = [weight.cpu()] if parts == 0 else [high, round_tf32(weight.cpu() - high)][:parts]
    assert packed.shape == (6 * max(1, parts), -(-c_out // 64) * 64, 48)
    for i, part in enumerate(expected):
        for tap in range(6):
            assert torch.equal(packed[6 * i + tap, :c_out, :41], part.flatten(2)[:, :, tap].T)
    assert not packed[:, c_out:].any() and not packed[:, :, 41:].any()


@pytest.mark.parametrize("suite", SUITES)
def test_tiles_fit(suite):
    """Every tile chosen for the suites fits the shared memory and has the stages without which the kernel would hang."""
    chosen = 0
    for layer in layers(suite):
        dtypes = (torch.float32, True), (torch.float32, False), (torch.bfloat16, True)
        for (dtype, tf32), source in itertools.product(dtypes, ("width", "vectors")):
            shape = layer.input_shape
            sizes = layer.geometry, shape[0], shape[1], layer.out_channels, shape[2:]
            problem = Problem("forward", *sizes, dtype, tf32, source, source, 16 if source == "vectors" else 1)
            tile = plan(problem, TARGET).config
            if not isinstance(tile, shift.Shift):
                continue
            chosen += 1
            blocks = -(-layer.in_channels // tile.kb)
            axes = (tile.depth, tile.height) if tile.by_row else (tile.depth,)
            readings = prod(max(len(axis.taps(a)) for a in range(axis.stride)) for axis in axes)
            rows = tile.ring + tile.slots * tile.parts * shift.M
            output = tile.consumers * tile.fold.channels * tile.chunk * tile.joined * tile.dst_size
            staging = tile.staging * tile.bring * tile.kb
            assert (rows * tile.kb + staging) * tile.size + output <= shift.SHARED
            assert tile.ring >= tile.stages * tile.pitch >= tile.stages * tile.halo_rows * tile.of_copy
            assert not tile.strip or tile.dst_layout == "channels" or tile.box * tile.joined % tile.dst_vector == 0
            held = tile.all_phases and (tile.height.stride > 1 or tile.work == "tiles")
            assert tile.stages >= (blocks * readings + 1 if held else 2)
            assert tile.work != "tiles" or (tile.resident and tile.all_phases)
            assert tile.pixels // tile.groups * tile.fold.accumulators <= 256 and tile.fold.joined >= tile.stride_w
            assert not tile.resident or tile.slots == tile.whole * blocks
    assert chosen > 100


@pytest.mark.parametrize(
    ("change", "why"),
    (
        (dict(target=Target("cuda", 80, 108)), "the shift kernel is for sm_90"),
        (dict(target=Target("cuda", 90, 132, (3, 10))), "the shift kernel was not tried with Triton 3.10"),
        (dict(geometry=geometry(2, 5, (1, 257))), "the shift kernel has strides up to 256 along the width"),
        (
            dict(geometry=geometry(2, (1, 33))),
            "the shift kernel has up to 32 taps along the width, or 8 strides above 16",
        ),
        (dict(geometry=geometry(2, (3, 4), (300, 2))), "the shift kernel has strides up to 256 along the height"),
        (
            dict(geometry=geometry(2, 4, 2, (1 << 16, 1))),
            "the shift kernel has strides up to 32768 along the depth, paddings along depth and height",
        ),
        (dict(large=True), "the shift kernel has 32-bit offsets"),
        (dict(c_in=15), "few input channels"),
        (dict(source="strided"), "of the tensors' strides"),
        (dict(batch=1, c_out=64, input_size=(2, 2)), "none of the shift kernel's tiles fits or fills the GPU"),
        (
            dict(geometry=geometry(2, 4, 2, 1, groups=2), c_in=128, c_out=128, batch=1, input_size=(8, 8))
            | dict(target=replace(TARGET, without=("aten", "columns"))),
            "none of the shift kernel's tiles fits or fills the GPU",
        ),
    ),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_left_to_the_portable_kernels_and_why(change, why):
    facts = dict(geometry=geometry(2, 4, 2, 1), batch=16, c_in=64, c_out=64, input_size=(64, 64), target=TARGET)
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

    @property
    def geometry(self):
        return geometry(len(self.input) - 2, self.weight[2:], **self.layer)

    def problem(self, precision, source="width", destination="width", vector=1):
        dtype = getattr(torch, precision, torch.float32)
        sizes = self.input[0], self.input[1], self.weight[1], self.input[2:]
        facts = self.geometry, *sizes, dtype, precision == "tf32", source, destination, vector
        return Problem("forward", *facts, bias=True)

    def is_taken(self, precision, destination="width"):
        """Whether the shift kernel has its precision."""
        _, height, width = self.geometry.axes3
        how = precision_of(self.problem(precision, destination=destination), TARGET)
        products = self.input[1] * prod(axis.most_taps for axis in self.geometry.axes)
        exact = height.kernel * width.kernel <= shift.MOST_IEEE_TAPS or products <= shift.SHORT_IEEE_SUM
        return how != "ieee" and (how != "tf32x3" or exact)


CASES = (
    Case("k4s2", (16, 64, 65, 80), (64, 64, 4, 4), dict(stride=2, padding=1)),
    Case("k4s2_streamed", (24, 512, 17, 16), (512, 192, 4, 4), dict(stride=2, padding=1)),
    Case("k3s2", (40, 96, 63, 33), (96, 80, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Case("k5s2", (16, 208, 40, 48), (208, 64, 5, 5), dict(stride=2, padding=2, output_padding=1)),
    Case("k2s2", (32, 128, 59, 62), (128, 48, 2, 2), dict(stride=2)),
    Case("k3", (20, 64, 75, 59), (64, 64, 3, 3), dict(padding=1)),
    Case("k3x5_dilated", (24, 32, 80, 52), (32, 64, 3, 5), dict(padding=(0, 3), dilation=(2, 1))),
    Case("k3_together", (16, 512, 40, 40), (512, 512, 3, 3), dict(padding=1)),
    Case("k4s2_wide", (16, 256, 40, 48), (256, 256, 4, 4), dict(stride=2, padding=1)),
    Case("k3s2_wide", (16, 256, 40, 48), (256, 256, 3, 3), dict(stride=2)),
    Case("k2", (16, 256, 60, 64), (256, 128, 2, 2)),
    Case("k4s2_two_channels", (8, 208, 48, 56), (208, 2, 4, 4), dict(stride=2, padding=1)),
    Case("k7s2", (16, 64, 40, 44), (64, 64, 7, 7), dict(stride=2, padding=3, output_padding=1)),
    Case("k5x7_empty_phases", (16, 96, 33, 60), (96, 64, 5, 7), dict(stride=(4, 1), dilation=(2, 1))),
    Case("k16s8_short", (2, 21, 54, 70), (21, 21, 16, 16), dict(stride=8)),
    Case("k7", (16, 64, 60, 75), (64, 64, 7, 7), dict(padding=3)),
    Case("k9x4s3x2", (32, 64, 30, 47), (64, 96, 9, 4), dict(stride=(3, 2), padding=(2, 1), output_padding=(1, 0))),
    Case("k7x5_dilated", (24, 96, 31, 33), (96, 64, 7, 5), dict(padding=2, dilation=(3, 1))),
    Case("k12s12x1", (16, 128, 20, 90), (128, 48, 12, 3), dict(stride=(12, 1))),
    Case("s4x1", (16, 96, 40, 100), (96, 48, 8, 1), dict(stride=(4, 1))),
    Case("1d_k4s2", (8, 128, 6001), (128, 64, 4), dict(stride=2, padding=1)),
    Case("1d_k3", (6, 64, 16383), (64, 96, 3)),
    Case("1d_k14s7", (4, 256, 1401), (256, 128, 14), dict(stride=7, padding=4, output_padding=1)),
    Case("1d_k12s6", (16, 128, 3000), (128, 64, 12), dict(stride=6, padding=2)),
    Case("k6s3", (16, 64, 60, 75), (64, 64, 6, 6), dict(stride=3, padding=2, output_padding=1)),
    Case("narrow", (400, 256, 7, 6), (256, 256, 4, 4), dict(stride=2, padding=1)),
    Case("k3_few", (40, 48, 60, 44), (48, 32, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Case("k5s5", (64, 64, 24, 40), (64, 64, 5, 5), dict(stride=5)),
    Case("k4s4", (16, 256, 62, 54), (256, 128, 4, 4), dict(stride=4)),
    Case("k6s3", (8, 128, 1, 3000), (128, 64, 1, 6), dict(stride=(1, 3), output_padding=(0, 1))),
    Case("1d_k16s8", (16, 256, 258), (256, 128, 16), dict(stride=8, padding=4)),
    Case("1d_k16s8_unpadded", (4, 512, 901), (512, 256, 16), dict(stride=8)),
    Case("1d_k14s7", (4, 768, 700), (768, 384, 14), dict(stride=7, output_padding=1)),
    Case("1d_k7s3", (2, 512, 5003), (512, 384, 7), dict(stride=3, padding=2)),
    Case("1d_k11s5", (1, 256, 8004), (256, 128, 11), dict(stride=5, padding=3)),
    Case("k5s4x3", (16, 64, 33, 50), (64, 96, 5, 5), dict(stride=(4, 3), padding=(1, 2))),
    Case("1d_k1024s256", (12, 80, 63), (80, 80, 1024), dict(stride=256)),
    Case("1d_k80s20", (4, 128, 999), (128, 64, 80), dict(stride=20, padding=3)),
    Case("k4s2_parts", (1, 1024, 16, 16), (1024, 256, 4, 4), dict(stride=2, padding=1)),
    Case("3d_k2s2_parts", (4, 768, 6, 6, 6), (768, 120, 2, 2, 2), dict(stride=2)),
    Case("1d_k8s4", (4, 96, 9001), (96, 48, 8), dict(stride=4)),
    Case("3d_k3s2", (8, 64, 9, 21, 32), (64, 32, 3, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Case("3d_k1x3x3", (4, 64, 12, 60, 64), (64, 64, 1, 3, 3), dict(padding=(0, 1, 1))),
    Case("3d_k1x2x2", (2, 64, 20, 64, 56), (64, 32, 1, 2, 2), dict(stride=(1, 2, 2))),
    Case("3d_k3", (8, 32, 17, 30, 33), (32, 64, 3, 3, 3), dict(padding=(0, 1, 2))),
    Case("3d_k2s2", (2, 128, 32, 32, 31), (128, 64, 2, 2, 2), dict(stride=2)),
    Case("3d_k4s2_16", (16, 16, 16, 33, 32), (16, 64, 4, 4, 4), dict(stride=2, padding=1)),
    Case("3d_k3x5x7", (8, 32, 12, 21, 40), (32, 64, 3, 5, 7), dict(padding=(1, 2, 0))),
    Case("3d_k2s3_empty_phase", (2, 64, 4, 64, 64), (64, 192, 2, 2, 2), dict(stride=(3, 2, 2))),
    Case("3d_k3s2_depth", (8, 64, 20, 30, 40), (64, 48, 3, 1, 3), dict(stride=(2, 1, 1), dilation=(3, 1, 1))),
    Case("k4s2_image", (8, 64, 48, 56), (64, 3, 4, 4), dict(stride=2, padding=1)),
    Case("k2s2_20", (32, 32, 60, 63), (32, 20, 2, 2), dict(stride=2)),
    Case("k4s2_66", (16, 66, 49, 48), (66, 32, 4, 4), dict(stride=2, padding=1)),
    Case("k2s2_130", (32, 130, 48, 49), (130, 64, 2, 2), dict(stride=2)),
    Case("k9s3_one", (4, 56, 60, 61), (56, 1, 9, 9), dict(stride=3, padding=4, output_padding=2)),
    Case("k2s2_90", (32, 90, 48, 49), (90, 90, 2, 2), dict(stride=2)),
    Case("k3_odd", (16, 65, 60, 61), (65, 17, 3, 3), dict(padding=1)),
    Case("k4s4_nine", (32, 64, 40, 41), (64, 9, 4, 4), dict(stride=4)),
    Case("3d_k3_24", (8, 48, 12, 30, 33), (48, 24, 3, 3, 3), dict(padding=1)),
    Case("3d_k1_14", (8, 32, 17, 60, 61), (32, 14, 1, 1, 1)),
)
PRECISIONS = "tf32", "ieee", "float16", "bfloat16"


def in_channels_last(channels):
    """The LAYOUT and vector of a dense channels_last tensor."""
    return "width" if channels == 1 else "channels" if channels % 16 else "vectors", gcd(channels, 16)


@pytest.mark.parametrize(
    ("dtype", "c_in", "c_out", "vector", "expected"),
    (
        (torch.bfloat16, 64, 64, 16, ("bulk", 8, 8, 64)),
        (torch.bfloat16, 56, 20, 8, ("bulk", 8, 4, 32)),
        (torch.bfloat16, 64, 64, 4, ("threads", 4, 8, 64)),  # a view that does not begin at 16 bytes
        (torch.bfloat16, 66, 3, 2, ("threads", 2, 1, 4)),
        (torch.float32, 66, 90, 2, ("threads", 2, 2, 64)),
        (torch.float32, 65, 17, 16, ("threads", 1, 1, 32)),  # some channels of a tensor of more
        (torch.float32, 64, 2, 16, ("threads", 4, 2, 2)),
    ),
)
def test_loads_and_stores_of_channels_are_as_wide_as_they_may_be(dtype, c_in, c_out, vector, expected):
    layouts = (in_channels_last(channels)[0] for channels in (c_in, c_out))
    problem = Problem("forward", geometry(2, 3, 1, 1), 32, c_in, c_out, (64, 64), dtype, True, *layouts, vector)
    tile = plan(problem, TARGET).config
    assert (tile.how, tile.vector, tile.dst_vector, tile.dst_channels) == expected


@pytest.mark.parametrize(
    ("dtype", "source", "vector", "dense", "release", "expected"),
    (
        (torch.bfloat16, "width", 16, True, (3, 6), ("bulk", True)),
        (torch.bfloat16, "width", 16, False, (3, 6), ("threads", False)),  # a view: not copied, of which a part may be seen
        (torch.bfloat16, "vectors", 16, True, (3, 6), ("bulk", False)),
        (torch.float32, "width", 16, True, (3, 9), ("bulk", True)),
        (torch.float32, "vectors", 16, True, (3, 6), ("bulk", True)),  # which cannot have bulk copies round
        (torch.float32, "vectors", 16, True, (3, 7), ("bulk", False)),
        (torch.float32, "vectors", 2, False, (3, 7), ("threads", False)),
    ),
)  # fmt: skip
def test_what_is_read_often_is_copied_first(dtype, source, vector, dense, release, expected):
    """Of many output channels, each tile of which reads the input again."""
    sizes = geometry(2, 2, 2), 1, 1024, 1024, (48, 48)
    problem = Problem("forward", *sizes, dtype, True, source, source, vector, dense=dense)
    chosen = plan(problem, replace(TARGET, triton=release))
    assert (chosen.config.how, chosen.arranged) == expected
    few = replace(problem, c_out=64, input_size=(256, 256))
    assert not plan(few, replace(TARGET, triton=release)).arranged


def test_small_grids_are_filled_by_parts_of_the_sums():
    sizes = geometry(2, 4, 2, 1), 1, 1024, 256, (16, 16)
    for dtype, source in itertools.product((torch.float32, torch.bfloat16), ("width", "vectors")):
        chosen = plan(Problem("forward", *sizes, dtype, True, source, source, 16, bias=True), TARGET)
        assert chosen.family == "shift" and chosen.splits > 1 and chosen.config.partial
        assert not chosen.config.resident and chosen.config.dst_size == 4
        many = plan(Problem("forward", sizes[0], 32, *sizes[2:], dtype, True, source, source, 16, bias=True), TARGET)
        assert many.splits == 1 and not many.config.partial


@pytest.mark.parametrize(
    "change, taken",
    [
        ({}, True),
        (dict(dtype=torch.float32), True),
        (dict(dtype=torch.float32, tf32=False), True),
        (dict(batch=2), True),
        (dict(source="vectors", destination="vectors"), False),
        (dict(c_out=8 * 32), False),
        (dict(geometry=geometry(2, 3, 2, groups=64), c_in=64 * 64, c_out=64 * 64), False),
    ],
)
def test_wide_groups(change, taken):
    """StyleGAN2's, a sample's weights each: of contiguous tensors."""
    sizes = geometry(2, 3, 2, groups=8), 1, 4096, 2048, (64, 64)
    problem = Problem("forward", *sizes, torch.bfloat16, True, "width", "width", 16)
    chosen = plan(replace(problem, **change), TARGET)
    assert (chosen.family == "shift") == taken
    assert taken or "in contiguous tensors" in chosen.reason or chosen.family == "aten"
    assert (
        not taken or change.get("batch", 1) == 1 or (chosen.splits == 1 and not chosen.arranged)
    )  # parts are not dense


def formats(ndim):
    return (torch.contiguous_format, *{2: [torch.channels_last], 3: [torch.channels_last_3d]}.get(ndim, []))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_cases_take_the_shift_kernel(case):
    """By the plan for a Hopper GPU: what the next test runs there is this kernel."""
    last = in_channels_last(case.input[1])
    destinations = ("width", in_channels_last(case.weight[1])[0])[: len(formats(len(case.input) - 2))]
    for precision, (source, vector) in itertools.product(PRECISIONS, (("width", 1), ("width", 4), last)):
        for destination in destinations:
            chosen = plan(case.problem(precision, source, destination, vector), TARGET)
            assert (chosen.family == "shift") == case.is_taken(precision, destination), (precision, source, destination)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "case, precision",
    [(case, precision) for precision in PRECISIONS for case in CASES if case.is_taken(precision)],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_on_the_gpu(case, precision, reserve):
    """Against the oracle, in each combination of memory formats, and the same bits every time."""
    ndim = len(case.input) - 2
    reserve(64 * case.input[0] * case.weight[1] * prod(case.geometry.output_size(case.input[2:])))
    dtype = getattr(torch, precision, torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "ieee" if precision == "ieee" else "tf32"
    function = (tconv.conv_transpose1d, tconv.conv_transpose2d, tconv.conv_transpose3d)[ndim - 1]
    x = torch.randn(case.input, device="cuda", dtype=dtype)
    w = torch.randn(case.weight, device="cuda", dtype=dtype) / case.input[1] ** 0.5
    bias = torch.randn(case.weight[1], device="cuda", dtype=dtype)
    exact = ATEN[ndim](x.double(), w.double(), bias.double(), **case.layer)
    peer = ATEN[ndim](x, w, bias, **case.layer)
    for x_format, w_format in itertools.product(formats(ndim), repeat=2):
        inputs = x.contiguous(memory_format=x_format), w.contiguous(memory_format=w_format)
        assert tconv.explain(*inputs, bias, **case.layer).passes[0].plan.family == "shift"
        y = function(*inputs, bias, **case.layer)
        assert_no_worse(y, exact, peer, f"{x_format} {w_format}")
        assert all(torch.equal(y, function(*inputs, bias, **case.layer)) for _ in range(3))
        assert_no_worse(function(*inputs, **case.layer), exact - bias.double().view(-1, *(1,) * ndim), peer, "no bias")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("precision", ("tf32", "ieee", "float16", "bfloat16"))
@pytest.mark.parametrize("batch, groups", [(1, 8), (3, 2)])
def test_groups_on_the_gpu(batch, groups, precision):
    dtype = getattr(torch, precision, torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "ieee" if precision == "ieee" else "tf32"
    x = torch.randn(batch, 256 * groups, 33, 30, device="cuda", dtype=dtype)
    w = torch.randn(256 * groups, 128, 3, 3, device="cuda", dtype=dtype) / 16
    bias = torch.randn(128 * groups, device="cuda", dtype=dtype)
    options = dict(stride=2, groups=groups)
    assert tconv.explain(x, w, bias, **options).passes[0].plan.family == "shift"
    y = tconv.conv_transpose2d(x, w, bias, **options)
    exact = ATEN[2](x.double(), w.double(), bias.double(), **options)
    assert_no_worse(y, exact, ATEN[2](x, w, bias, **options), f"{groups} groups")
    assert all(torch.equal(y, tconv.conv_transpose2d(x, w, bias, **options)) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("c_in", (1024, 1022))
def test_tf32_is_rounded_to_nearest_even_however_it_comes(c_in):
    """An identity for a weight shows the values that are multiplied."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    bits = torch.randint(-(2**31), 2**31, (1, c_in, 48, 48), device="cuda").int()
    ties = torch.rand(bits.shape, device="cuda") < 0.5
    x = torch.where(ties, bits & ~0x1FFF | 0x1000, bits).view(torch.float32)
    x = torch.where(x.abs() < 1e30, x, 1.0)  # an infinity times a zero of the identity would be NaN
    w = torch.zeros(c_in, 1024, 2, 2, device="cuda")
    w.view(c_in, 1024, 4)[torch.arange(c_in), torch.arange(c_in)] = 1
    expected = round_tf32(x.cpu()).repeat_interleave(2, 2).repeat_interleave(2, 3)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = tconv.conv_transpose2d(x.contiguous(memory_format=memory_format), w, stride=2).cpu()
        assert torch.equal(y[:, :c_in], expected), memory_format
        assert not y[:, c_in:].any()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "case, precision",
    [(case, precision) for precision in ("float16", "ieee") for case in CASES if case.is_taken(precision)],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_infinities_stay_where_they_belong(case, precision, ieee):
    """An infinity in the input reaches the outputs that its taps reach, and no other."""
    ndim, dtype = len(case.input) - 2, getattr(torch, precision, torch.float32)
    function = (tconv.conv_transpose1d, tconv.conv_transpose2d, tconv.conv_transpose3d)[ndim - 1]
    x = torch.randn(case.input, device="cuda", dtype=dtype)
    w = torch.randn(case.weight, device="cuda", dtype=dtype) / case.input[1] ** 0.5
    x[-1, 1][tuple(n // 2 for n in case.input[2:])] = torch.inf
    exact = ATEN[ndim](x.double(), w.double(), **case.layer)
    for each in formats(ndim):
        y = function(x.contiguous(memory_format=each), w, **case.layer)
        assert torch.equal(y.isfinite(), exact.isfinite()), each
