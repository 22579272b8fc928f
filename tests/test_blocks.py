"""The block kernel (kernel = stride without padding): its own code on the CPU by tests/machine.py, itself on a Hopper GPU."""

import dataclasses
import inspect
import itertools
from math import prod

import pytest
import torch
from machine import Emulated
from oracle import ATEN, assert_no_worse, errors, oracle, round_tf32
from samples import TCONV
from test_machine import LAST, assert_near
from triton.experimental.gluon._runtime import GluonASTSource

from tconv import blocks, configs, dispatch, explain, launch, layouts
from tconv.configs import Target
from tconv.geometry import Geometry, sizes3
from tconv.kernels import blocks as kernels
from tconv.launches.blocks import forward
from tconv.problem import Plan
from tconv.workloads import SUITES, layers

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for that")
on_hopper = pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEW = Target("interpreter", 0, 5)  # processors: so that each CTA has several tiles
PADDED = blocks.MOST_PADDED
TARGET = Target("cuda", 90, 132, (3, 9), ("columns", "few"))

# name: (input, output channels, kernel)
LAYERS = {
    "rows": ((2, 72, 6, 40), 24, (2, 2)),
    "rows of several boxes": ((1, 24, 3, 192), 48, (2, 2)),
    "several rows in a box": ((3, 40, 8, 16), 20, (2, 2)),
    "rows beside the end of a box": ((2, 48, 5, 24), 36, (2, 2)),
    "k4": ((1, 136, 8, 32), 24, (4, 4)),
    "a stride of one": ((2, 40, 7, 32), 32, (2, 1)),
    "1-d": ((3, 40, 160), 72, (4,)),
    "depth": ((2, 32, 4, 6, 32), 16, (2, 2, 2)),
    "depth, several rows in a box": ((2, 72, 5, 4, 8), 40, (2, 2, 2)),
    "depth of one": ((1, 40, 3, 4, 32), 48, (1, 2, 2)),
    "k1": ((2, 72, 6, 20), 48, (1, 1)),
    "k3": ((2, 40, 5, 32), 32, (3, 3)),
    "rows of 8 bytes": ((2, 24, 12, 44), 16, (2, 2)),  # and 80: of 16-bit elements no bulk copy can begin with a row
    "long rows": ((1, 16, 1, 320), 16, (1, 2)),
    "64 channels in rows of 64": ((2, 24, 2, 64), 64, (2, 2)),
    "64 channels in rows of 16": ((2, 24, 4, 16), 64, (2, 2)),
    "pieces of a row of the block": ((2, 24, 2, 64), 24, (1, 3)),
    "pieces, rows": ((2, 24, 2, 64), 40, (2, 1)),
    "boxes of 16": ((1, 24, 3, 48), 32, (2, 2)),
    "boxes of 32": ((2, 24, 2, 96), 32, (2, 2)),
    "short rows": ((2, 24, 8, 4), 64, (2, 2)),
}


def geometry(kernel):
    n = len(kernel)
    return Geometry(kernel, kernel, (0,) * n, (0,) * n, 1, (1,) * n)


def tiles(name, dtype, last, monkeypatch):
    """All tiles that fit the layer, the other sizes that tiles come in included: as they are chosen, and with more of them empty, of
    larger boxes."""
    (_, c_in, *size), c_out, kernel = LAYERS[name]
    layer = sizes3(kernel), c_in, c_out, blocks.joined(kernel, tuple(size)), dtype, "channels" if last else "width"
    found = []
    for padded in (PADDED, 1.7):
        monkeypatch.setattr(blocks, "MOST_PADDED", padded)
        found += blocks._candidates(*layer)
    return list(dict.fromkeys(found))


# (layer, bytes of an element, channels_last) that no tile fits: rows shorter than a box in channels_last, channels that are not packed
# in whole 16 rows, strides that are no powers of two, rows that begin between two multiples of 16 bytes.
NONE = {
    *((name, size, True) for name in LAYERS if "rows in a box" in name or "beside" in name for size in (2, 4)),
    *(("rows", 4, True), ("k4", 4, True)),
    *(("k3", size, False) for size in (2, 4)),
    ("rows of 8 bytes", 2, False),
    *(("short rows", *facts) for facts in ((2, False), (2, True), (4, True))),
    ("64 channels in rows of 16", 2, True),
    *(("pieces of a row of the block", *facts) for facts in ((2, False), (4, False), (4, True))),
    ("pieces, rows", 4, True),
}


def draw(name, dtype, last, device="cpu"):
    size, c_out, kernel = LAYERS[name]
    x, w, bias = torch.randn(size), torch.randn(size[1], c_out, *kernel) / size[1] ** 0.5, torch.randn(c_out)
    x, w, bias = (t.to(device, DTYPES[dtype]) for t in (x, w, bias))
    if last:
        x, w = (t.contiguous(memory_format=LAST[len(kernel)]) for t in (x, w))
    return x, w, bias


def run(name, dtype, last, tile, seed=0, change=None, with_bias=True):
    torch.manual_seed(seed)
    (x, w, bias), g = draw(name, dtype, last), geometry(LAYERS[name][2])
    bias = bias if with_bias else None
    y = layouts.empty_output(x, w, g.output_size(x.shape[2:]), w.shape[1]).fill_(torch.nan)
    noted = Emulated(x, w, bias, y, seed=seed, change=change)
    forward(noted, Plan("blocks", "", "", tile), FEW, x, w, bias, y)
    if dtype == "tf32":
        x, w = round_tf32(x), round_tf32(w)
    return y, ATEN[g.ndim](x.double(), w.double(), None if bias is None else bias.double(), stride=g.stride)


@on_cpu
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", ("tf32", "bf16"))
@pytest.mark.parametrize("name", LAYERS)
def test_the_kernel_makes_the_convolution(name, dtype, last, monkeypatch):
    if last and len(LAYERS[name][2]) == 1:
        pytest.skip("1-d tensors have no channels_last")
    found = tiles(name, dtype, last, monkeypatch)
    assert bool(found) == ((name, DTYPES[dtype].itemsize, last) not in NONE)
    for i, tile in enumerate(found):
        assert_near(*run(name, dtype, last, tile, seed=i, with_bias=i > 0), dtype, tile)


# What holds the kernel together, and what it is without.
CHANGES = {
    "a stage is used again when it has been read": ("mbarrier.wait(empty.index(s)", "mbarrier.wait(full.index(s)"),
    "products wait for their stage": ("mbarrier.wait(full.index(s), i // p.stages & 1)", "pass"),
    "products wait for the weights": ("    mbarrier.wait(w_full.index(0), 0)\n", ""),
    "packed weights are waited for": ("await_launches(blocks)", "pass"),
    "a tile is read from the buffer before the next one": ("    tma.store_wait(0)\n    barrier()", "    barrier()"),
    "the last tile leaves the buffer": ("    tma.store_wait(0)\n\n\n#", "\n\n#"),
    "16-bit products are done before their stage is used again": (
        "warpgroup_mma_wait(1, deps",
        "warpgroup_mma_wait(2, deps",
    ),
    "the stage of the last product is kept": ("empty.index(before), count=1, pred", "empty.index(s), count=1, pred"),
    "fp32 is rounded": (
        "round_to_tf32(a.load(gl.DotOperandLayout(0, layout, 1)))",
        "a.load(gl.DotOperandLayout(0, layout, 1))",
    ),
}


@on_cpu
@pytest.mark.parametrize("change", CHANGES)
def test_the_stand_in_notices(change, monkeypatch):
    """Each of these would be a race, a hang or a wrong result on a GPU."""
    name, dtype = ("k4", "bf16") if "stage" in change and "product" in change else ("rows", "tf32")
    tile = dataclasses.replace(tiles(name, dtype, False, monkeypatch)[0], stages=2)
    with pytest.raises(AssertionError):
        for seed in range(6):
            assert_near(*run(name, dtype, False, tile, seed, CHANGES[change]), dtype, tile)


def problem_of(name, dtype, last, **more):
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    x, w, _ = draw(name, dtype, last)
    g = geometry(LAYERS[name][2])
    y = layouts.empty_output(x, w, g.output_size(x.shape[2:]), w.shape[1])
    return dataclasses.replace(launch.make_problem("forward", g, x.shape, w.shape[1], x, y, w), **more)


def test_which_layers_it_takes():
    plan = dispatch.plan
    assert plan(problem_of("depth of one", "bf16", False), TARGET).family == "blocks"
    assert plan(problem_of("k3", "fp16", True), TARGET).family == "blocks"
    assert plan(problem_of("depth of one", "tf32", False), TARGET).family == "blocks"
    # Not on other GPUs, without alignment, in IEEE fp32, and of weights that lie otherwise.
    assert plan(problem_of("depth of one", "bf16", False), dataclasses.replace(TARGET, arch=80)).family != "blocks"
    assert plan(problem_of("depth of one", "bf16", False, aligned=False), TARGET).family != "blocks"
    assert plan(problem_of("depth of one", "bf16", False, weight="channels"), TARGET).family != "blocks"
    assert plan(problem_of("depth of one", "tf32", False, weight="channels"), TARGET).family == "blocks"
    assert plan(problem_of("depth of one", "tf32", False, tf32=False), TARGET).family != "blocks"
    assert plan(problem_of("depth of one", "bf16", False, batch=1 << 24), TARGET).family != "blocks"  # 2^33 pixels
    wide = dict(geometry=geometry((2, 8, 2)), batch=1)  # 2^29.8 pixels, but 2^30.8 rows of the output; and a fiftieth
    assert plan(problem_of("depth", "bf16", False, input_size=(20000, 6000, 8), **wide), TARGET).family != "blocks"
    assert plan(problem_of("depth", "bf16", False, input_size=(400, 6000, 8), **wide), TARGET).family == "blocks"
    said = plan(
        problem_of("depth of one", "bf16", False), dataclasses.replace(TARGET, without=("columns", "few", "blocks"))
    )
    assert said.family != "blocks" and "the block kernel is left out" in said.reason


@pytest.mark.parametrize(
    "change",
    (
        dict(padding=(1, 0)),
        dict(output_padding=(0, 1)),
        dict(dilation=(1, 2)),
        dict(kernel=(2, 3)),
        dict(groups=2),
    ),
    ids=str,
)
def test_what_is_no_block(change):
    assert blocks.takes(geometry((2, 2)))
    assert not blocks.takes(dataclasses.replace(geometry((2, 2)), **change))


def test_tritons_cache_knows_what_a_tiles_properties_are_made_of(monkeypatch):
    """Or it would run old kernels after they have changed."""
    tile = next(blocks._candidates((1, 2, 2), 64, 32, (1, 64, 64), "bf16", "width"))

    def digest():
        types = {name: "constexpr" if name == "p" else "i32" for name in kernels.blocks_forward.arg_names}
        return GluonASTSource(kernels.blocks_forward, types, {"p": tile}, {}).hash()

    before = digest()
    assert digest() == before
    configs._code_behind.cache_clear()
    getsource = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda m: getsource(m) + "# changed" * (m is blocks))
    assert digest() != before
    configs._code_behind.cache_clear()


def test_every_family_of_tiles_is_seen():
    """Those that benchmarked layers take, among the ones that the tests above run."""
    tested, taken = set(), set()
    with pytest.MonkeyPatch.context() as patch:
        for name, dtype, last in itertools.product(LAYERS, ("tf32", "bf16"), (False, True)):
            tested |= {form(tile) for tile in tiles(name, dtype, last, patch)}
    for layer in (layer for suite in SUITES for layer in layers(suite)):
        if not blocks.takes(layer.geometry):
            continue
        for dtype, last in itertools.product(("tf32", "bf16"), ("width", "channels")):
            sizes = layer.input_shape[0], layer.in_channels, layer.out_channels, layer.input_shape[2:]
            tile = blocks.choose(sizes3(layer.geometry.kernel), *sizes, dtype, last, 132)
            taken |= {form(tile)} if tile else set()
    assert taken <= tested, taken - tested


def form(tile):
    return tile.layout, tile.dtype, tile.box, tile.chunk


def test_tiles_fit():
    """Of all kinds of sizes: shared memory, whole boxes, and tiles that cover the problem."""
    seen = set()
    for stride, width in (
        (s, w) for s in ((1, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 4), (1, 2, 1)) for w in (4, 14, 24, 96, 200)
    ):
        for c_in, c_out in ((16, 8), (64, 32), (256, 128), (512, 24)):
            for dtype, layout in (("bf16", "width"), ("bf16", "channels"), ("tf32", "width"), ("tf32", "channels")):
                size = (4, 8, width)
                for tile in blocks._candidates(stride, c_in, c_out, size, dtype, layout):
                    seen.add((layout, dtype, tile.pixels, tile.columns))
                    weights = tile.slots * tile.kb * tile.columns * tile.size
                    stages = 2 * tile.stages * tile.pixels * tile.kb * tile.size
                    assert weights + stages + 2 * tile.pixels * tile.columns * tile.size <= blocks.SHARED
                    assert (
                        tile.slots * tile.kb >= c_in
                        and tile.box <= tile.pixels
                        and tile.unit * tile.units == tile.pixels
                    )
                    walked = blocks.walk(tile, 3, c_out, size, 132)
                    assert (
                        walked.tiles * tile.pixels >= 3 * prod(size)
                        and walked.columns * tile.columns >= c_out * tile.taps
                    )
                    assert walked.grid % walked.columns == 0
                    assert walked.lines * walked.boxes * tile.box <= blocks.MOST_PADDED * prod(size)
    assert len(seen) >= 8


@on_hopper
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu(name, dtype, last, monkeypatch, device):
    """Every tile, several a CTA, as exact as torch; the same bits again."""
    n = len(LAYERS[name][2])
    if last and n == 1:
        pytest.skip("1-d tensors have no channels_last")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    x, w, bias = draw(name, dtype, last, device)
    x = torch.cat([x] * 40).contiguous(memory_format=LAST[n] if last else torch.contiguous_format)
    exact = ATEN[n](x.double(), w.double(), bias.double(), stride=LAYERS[name][2])
    for tile in tiles(name, dtype, last, monkeypatch):
        monkeypatch.setattr(dispatch, "plan", lambda problem, target, tile=tile: Plan("blocks", "", "", tile))
        launch.record.forget()
        y, again = (launch.forward(x, w, bias, geometry(LAYERS[name][2])) for _ in range(2))
        if dtype == "tf32":
            rounded = oracle(n, x, w, bias, torch.zeros_like(y), tf32=True, stride=LAYERS[name][2])[0]
            assert errors(y, rounded)[1] < 4e-6, tile.describe()
        else:
            assert_no_worse(y, exact, ATEN[n](x, w, bias, stride=LAYERS[name][2]), tile.describe())
        assert torch.equal(y, again)
        assert y.stride() == ATEN[n](x, w, bias, stride=LAYERS[name][2]).stride()


@on_hopper
def test_it_is_chosen_and_explained(device):
    with dispatch.without():
        x, w, bias = (t.to(device) for t in draw("depth of one", "bf16", False))
        told = explain(x, w, bias, stride=(1, 2, 2)).passes[0]
    assert told.plan.family == "blocks" and "bulk stores" in str(told)


@on_hopper
@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("dtype", ("bf16", "tf32"))
def test_nan_and_inf(dtype, value, device):
    """They reach their own block alone."""
    x, w, bias = draw("depth of one", dtype, False, device)
    x[0, 1, 2, 3, 4] = value
    assert explain(x, w, bias, stride=(1, 2, 2)).passes[0].plan.family == "blocks"
    reached = ~torch.isfinite(TCONV[3](x, w, bias, stride=(1, 2, 2)))
    assert reached[0, :, 2, 6:8, 8:10].all() and reached.sum() == 4 * w.shape[1]
