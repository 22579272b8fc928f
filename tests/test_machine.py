"""The shift kernel's own code, run on the CPU by tests/machine.py, on a GPU's behalf."""

import random
from dataclasses import replace
from math import gcd
from pathlib import Path

import pytest
import torch
from machine import Emulated, Machine, Value, namespace
from oracle import ATEN, round_tf32
from test_shift import GEOMETRIES

import tconv.kernels.shift as kernels
from tconv import shift
from tconv.configs import Target
from tconv.geometry import sizes3
from tconv.launches.shift import forward
from tconv.problem import Plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for that")

DTYPES = {"tf32": torch.float32, "tf32x3": torch.float32, "bf16": torch.bfloat16}
LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


FEW = Target("interpreter", 0, 2)  # processors: so that each CTA has several tiles


def kinds(g, dtype, c_in, c_out, columns, partial=False):
    """By kind, all tiles of a layer: (tile, whether the input is channels_last, the output)."""
    found: dict = {}
    vector = 8 if dtype == "bf16" else 4
    by_copy = {"bf16": ("bulk",), "tf32": ("staged", "bulk"), "tf32x3": ("staged",)}[dtype]
    ways = [("width", "threads"), ("width", "staged"), ("channels", "threads"), *(("channels", how) for how in by_copy)]
    for source, how in ways:
        for destination in ("width", "channels"):
            if g.ndim == 1 and destination == "channels":
                continue
            if source == "channels" and how != "threads" and c_in % vector:
                continue
            vectors = [
                gcd(c, vector) if each == "channels" else 1 for c, each in ((c_in, source), (c_out, destination))
            ]
            for each in shift.candidates(g.axes3, dtype, columns, c_in, c_out, how, 1):
                tile = shift.make(
                    g.axes3, dtype, c_in, c_out, *each, source, destination, *vectors, g.ndim == 3, partial
                )
                if tile:
                    kind = (
                        source,
                        how,
                        destination,
                        tile.work,
                        tile.all_phases,
                        tile.resident,
                        tile.fold.phases,
                        tile.fold.accumulators,
                    )
                    found.setdefault(kind, []).append((tile, source == "channels", destination == "channels"))
    return found


SIZES = {1: (41,), 2: (7, 9), 3: (3, 5, 6)}


def run(
    g, dtype, tile, source_last, destination_last, c_in, c_out, seed, change=None, arranged=False, splits=1, groups=1, batch=2
):  # fmt: skip
    """The layer's output with this tile, and what it should be.  arranged: of a copy of the input, which is dense then, as it is
    for strips.  c_in and c_out are a group's."""
    torch.manual_seed(seed)
    size, g = SIZES[g.ndim], replace(g, groups=groups)
    x, w = torch.randn(batch, c_in * groups, *size), torch.randn(c_in * groups, c_out, *g.kernel)
    x, w, bias = (t.to(DTYPES[dtype]) for t in (x, w, torch.randn(c_out * groups)))
    y = torch.full((batch, c_out * groups, *g.output_size(size)), torch.nan, dtype=x.dtype)
    if source_last and (arranged or tile.strip):
        x = x.contiguous(memory_format=LAST[g.ndim])
    elif source_last:  # of a tensor of more channels, which are not to be read
        more = torch.cat((x, torch.full((2, 8, *size), torch.nan, dtype=x.dtype)), 1)
        x = more.movedim(1, -1).contiguous().movedim(-1, 1)[:, :c_in]
    y = y.contiguous(memory_format=LAST[g.ndim]) if destination_last else y
    w = w.movedim(1, -1).contiguous().movedim(-1, 1) if tile.raw else w
    precision = "half" if dtype == "bf16" else dtype
    noted = Emulated(x, w, bias, y, seed=seed, change=change)
    forward(noted, Plan("shift", "", precision, tile, splits, arranged=arranged), FEW, x, w, bias, y, g)
    if dtype == "tf32":
        x, w = round_tf32(x), round_tf32(w)
    options = dict(
        stride=g.stride, padding=g.padding, output_padding=g.output_padding, dilation=g.dilation, groups=groups
    )
    return y, ATEN[g.ndim](x.double(), w.double(), bias.double(), **options)


def assert_near(y, exact, dtype, tile, half=2**-8):
    """Equal but for fp32's rounding of the result, or bf16's, relative to the largest element."""
    bound = {"tf32": 1e-6, "tf32x3": 1e-6, "bf16": half}[dtype]
    assert (y.double() - exact).abs().max() <= bound * exact.abs().max(), tile.describe()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_makes_the_convolution(name, dtype):
    """Two tiles of kinds drawn from those of the layer (one of many taps, or in three parts, which take their time): several
    tiles a CTA, blocks of channels and channel tiles."""
    draw = random.Random(f"{name} {dtype}")
    g = GEOMETRIES[name]
    c_in = draw.choice((80, 72, 70, 65) if dtype == "bf16" else (48, 36, 42, 37))
    c_out = draw.choice((3, 16, 20, 70, 80))
    found = kinds(g, dtype, c_in, c_out, 12)
    for kind in draw.sample(sorted(found, key=repr), min(1 if g.taps > 27 or dtype == "tf32x3" else 2, len(found))):
        smallest = min(tile.of_tile for tile, *_ in found[kind])
        tile, *last = draw.choice([each for each in found[kind] if each[0].of_tile == smallest])
        y, exact = run(g, dtype, tile, *last, c_in, c_out, seed=draw.randrange(1000))
        assert_near(y, exact, dtype, tile)


@pytest.mark.parametrize(
    "name", ("1d_k11s5p3", "1d_k7s3p2", "1d_k5s4", "k3x9s1x4p1", "k6s3p2", "k5s3p1", "1d_k80s20p3", "k34s17p1")
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_and_four_accumulators(name, dtype):
    g, c_in, c_out = GEOMETRIES[name], 40, 40
    found = kinds(g, dtype, c_in, c_out, 12)
    chosen = {kind[:3]: kind for kind in found if kind[-1] > 2}
    assert chosen or dtype == "tf32x3"  # which has no registers for a tap's sum beside four
    for kind in chosen.values():
        tile, *last = found[kind][0]
        y, exact = run(g, dtype, tile, *last, c_in, c_out, seed=1)
        assert_near(y, exact, dtype, tile)


@pytest.mark.parametrize("name", ("k1", "k3p1", "k3x2s2x1", "3d_k3"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulators_of_other_channels(name, dtype):
    """Of stride 1 two or four tiles of output channels may share a reading of the input."""
    g, c_in, c_out = GEOMETRIES[name], 72, 150
    found = kinds(g, dtype, c_in, c_out, 12)
    draw = random.Random(f"{name} {dtype}")
    shared = sorted((kind for kind in found if kind[-1] > 1), key=repr)
    assert {kind[-1] for kind in shared} == ({2} if dtype == "tf32x3" else {2, 4})
    for kind in draw.sample(shared, 3):
        tile, *last = found[kind][0]
        y, exact = run(g, dtype, tile, *last, c_in, c_out, seed=5)
        assert_near(y, exact, dtype, tile)


@pytest.mark.parametrize("name", ("k4s2p1", "k2s2", "k3p1", "k1", "k3s2p1op1", "3d_k3s2p1op1", "3d_k3"))
def test_weights_as_they_lie(name):
    """In channels_last, without packing: both ways to hold them, several blocks and channel tiles."""
    g, draw = GEOMETRIES[name], random.Random(name)
    c_in, c_out = draw.choice((72, 80)), draw.choice((40, 72, 136))
    found = {kind: each for kind, each in kinds(g, "bf16", c_in, c_out, 12).items() if kind[6] == 1}
    for resident in sorted({kind[5] for kind in found}):
        kind = draw.choice(sorted((kind for kind in found if kind[5] == resident), key=repr))
        tile, *last = found[kind][0]
        assert shift.takes_raw(tile, "pieces", 64) and not shift.takes_raw(tile, "channels", 64)
        tile = replace(tile, raw=True)
        for arranged in {False, last[0] and tile.how == "bulk"}:  # a copy of the input is the launch ahead
            y, exact = run(g, "bf16", tile, *last, c_in, c_out, seed=3, arranged=arranged)
            assert_near(y, exact, "bf16", tile)
    assert not shift.takes_raw(replace(tile, size=4), "pieces", 64) and not shift.takes_raw(tile, "pieces", 56)


@pytest.mark.parametrize("name", ("k4s2p1", "k2s2", "k3p1", "1d_k16s8", "3d_k3s2p1op1", "k7x5p3x1"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_parts(name, dtype):
    """Blocks of channels shared between grids, unevenly, and added in fp32 and more."""
    g, c_in, c_out = GEOMETRIES[name], 200 if dtype == "bf16" else 136, 20
    found = kinds(g, dtype, c_in, c_out, 12, partial=True)
    chosen = {kind[:4]: kind for kind in found}
    assert chosen and all(not tile.resident for each in found.values() for tile, *_ in each)
    draw = random.Random(f"{name} {dtype}")
    for kind in draw.sample(sorted(chosen.values(), key=repr), min(1 if g.ndim == 3 else 2, len(chosen))):
        tile, *last = found[kind][0]
        splits = 2 if tile.kb >= 64 else 3
        y, exact = run(g, dtype, tile, *last, c_in, c_out, seed=3, splits=splits)
        # The sums are added by Triton's interpreter, which truncates to bfloat16.
        assert_near(y, exact, dtype, tile, half=2**-7)


@pytest.mark.parametrize("batch, arranged, splits", [(2, False, 1), (1, True, 1), (1, False, 2)])
@pytest.mark.parametrize("name", ("k3s2p1op1", "1d_k16s8"))
def test_groups(name, batch, arranged, splits):
    """Groups are parts of contiguous tensors; where there is one image, they are dense, and can be copied or summed in parts."""
    g, c_in, c_out = GEOMETRIES[name], 128 if splits > 1 else 64, 16
    found = kinds(g, "bf16", c_in, c_out, 12, partial=splits > 1)
    ways = ("channels", "bulk", "width") if arranged else ("width", "threads", "width")
    (tile, *_), *_ = next(each for kind, each in found.items() if kind[:3] == ways)
    y, exact = run(g, "bf16", tile, False, False, c_in, c_out, 3, None, arranged, splits, groups=3, batch=batch)
    assert_near(y, exact, "bf16", tile, half=2**-7 if splits > 1 else 2**-8)


@pytest.mark.parametrize("name", ("k4s2p1", "1d_k16s8", "3d_k3s2p1op1"))
@pytest.mark.parametrize("dtype", ("tf32", "bf16"))
@pytest.mark.parametrize("last", (False, True))
def test_of_a_copy_of_the_input(name, dtype, last):
    """Bulk copies of any number of channels and any width, from a copy with the channels innermost."""
    g, c_in, c_out = GEOMETRIES[name], 37, 20
    if last and g.ndim == 1:
        pytest.skip("1-d has no channels_last")
    found = kinds(g, dtype, 40, c_out, 12)
    chosen = [kind for kind in found if kind[:2] == ("channels", "bulk") and kind[3:5] == ("halves", True)][:2]
    assert chosen
    for kind in chosen:
        tile, _, destination_last = found[kind][0]
        y, exact = run(g, dtype, tile, last, destination_last, c_in, c_out, seed=0, arranged=True)
        assert_near(y, exact, dtype, tile)


@pytest.mark.parametrize(
    "name", ("k4s2p1", "k3s2p1op1", "k5s2p2", "k3p1", "k2s2", "k1", "3d_k3s2p1op1", "3d_k2s3", "k7x5p3x1", "1d_k16s8")
)
@pytest.mark.parametrize("dtype", ("tf32", "bf16"))
@pytest.mark.parametrize("last", (False, True))
def test_strips(name, dtype, last):
    """Pixels of rows one after the other, of a copy with zeros between them, or of channels_last where none is needed."""
    g, c_in, c_out = GEOMETRIES[name], 72, 20
    if last and g.ndim == 1:
        pytest.skip("1-d has no channels_last")
    whole = sizes3(SIZES[g.ndim])
    padded = shift.apart(g.axes3, whole, sizes3(g.output_size(SIZES[g.ndim])))
    found: dict = {}
    vector = 8 if dtype == "bf16" else 4
    vectors = vector, gcd(c_out, vector) if last else 1
    for each in shift.candidates(g.axes3, dtype, padded[2], c_in, c_out, "bulk", 1, padded[2]):
        tile = shift.make(
            g.axes3, dtype, c_in, c_out, *each, "channels", "channels" if last else "width", *vectors, g.ndim == 3
        )
        if tile:
            found.setdefault((tile.work, tile.all_phases), tile)
    assert found
    for tile in found.values():
        for arranged in (True, False) if last and padded == whole and dtype == "bf16" else (True,):
            y, exact = run(g, dtype, tile, last, last, c_in, c_out, seed=4, arranged=arranged)
            assert_near(y, exact, dtype, tile)


SOURCE = Path(kernels.__file__).read_text()
CHANGES = {
    "a stage is free for its second reader": ('READERS: gl.constexpr = 2 if p.work == "halves" else 1', "READERS: gl.constexpr = 1"),
    "nobody waits for a free stage": ("mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)", "pass"),
    "weights are not waited for": ("mbarrier.wait(w_full.index(slot), j // p.slots & 1)", "pass"),
    "a slot is freed before its product is done": ("accs = _wait(accs, 1, p)", "pass"),
    "a stage is never freed": ("mbarrier.arrive(x_empty.index(s), count=1)\n", "pass\n"),
    "the input is not rounded": ("to.store(round_to_tf32(v))", "to.store(v)"),
    "channels beyond the input's are read": ("& (c < c_in)[None, :]", "& (c >= 0)[None, :]"),
    "columns beyond the useful ones are stored": ("ok & (column < p.useful * UNIT)", "ok"),
}  # fmt: skip


AWAITED = {
    "streamed weights": ("    await_launches(sizes[4])\n    i = 0\n", "    i = 0\n", False),
    "resident weights": ("            await_launches(tiles)\n", "", True),
    "a copy of the input": ("        await_launches(sizes[4])\n    if p.how", "        pass\n    if p.how", True),
}


@pytest.mark.parametrize("name", AWAITED)
def test_earlier_launches_are_waited_for(name):
    """Whose results these are: the kernel begins before they have ended."""
    *change, resident = AWAITED[name]
    g = GEOMETRIES["k2s2" if resident else "k4s2p1"]
    found = kinds(g, "bf16", 40, 5, 12)
    kind = next(k for k in found if k[:3] == ("channels", "bulk", "width") and k[5] == resident)
    tile = found[kind][0][0]
    run(g, "bf16", tile, False, False, 37, 5, seed=0, arranged=True)
    with pytest.raises(AssertionError, match="an earlier launch is not waited for"):
        run(g, "bf16", tile, False, False, 37, 5, seed=0, arranged=True, change=tuple(change))


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_gpu_would_punish_is_found(name):
    """Each of these changes to the kernel, in one of a few orders of events."""
    g = GEOMETRIES["k4s2p1"]
    found = kinds(g, "tf32", 70, 5, 12)
    tile, *last = found["width", "threads", "width", "halves", False, False, 1, 2][0]
    assert CHANGES[name][0] in SOURCE
    run(g, "tf32", tile, *last, 70, 5, seed=0)
    with pytest.raises(AssertionError):
        for seed in range(5):
            y, exact = run(g, "tf32", tile, *last, 70, 5, seed, CHANGES[name])
            assert (y.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", ("k3s2p1op1", "3d_k3s2p1op1"))
@pytest.mark.parametrize("c_out", (64, 128, 192, 320, 768))
def test_ctas_do_all_phases_in_turn(name, c_out):
    """Every tile once; and phases of more taps fall to all CTAs about alike: to no one a quarter more than to the mean."""
    g = GEOMETRIES[name]
    found = kinds(g, "bf16", 64, c_out, 64)
    tile = next(
        each[0][0] for kind, each in found.items() if kind[:3] == ("channels", "bulk", "channels") and not kind[4]
    )
    size = sizes3((256, 64) if g.ndim == 2 else (8, 64, 64))
    walked = shift.walk(tile, g.axes3, 8, 64, c_out, size, sizes3(g.output_size(size[-g.ndim :])), 132)
    assert walked.tiles > 8 * walked.grid
    kernel = namespace(Machine((0, 0), (walked.grid, 1), tile.size, 0), kernels, None)
    scalars = {0: walked.tiles_co, 1: walked.tiles_w, kernel["OF_ROUND"]: walked.of_round, kernel["SPIN"]: walked.spin}
    sizes = {i: Value(n) for i, n in scalars.items()}
    places, work = set(), [0] * walked.grid
    for t in range(walked.tiles):
        co, phase, tile_w, row, phase_d = map(int, kernel["_decode"](Value(t), sizes, tile))
        places.add((co, phase, tile_w, row, phase_d))
        work[t % walked.grid] += len(tile.height.taps(phase)) * len(tile.depth.taps(phase_d))
    assert len(places) == walked.tiles
    assert max(work) <= 1.25 * sum(work) / len(work)
