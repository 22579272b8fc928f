"""Passes that are left to aten because it measured faster: which, with what reason, and that they come out right."""

import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from oracle import ATEN, errors, passes
from test_passes import CASES, TCONV, Case, by_id, make

import tconv
from tconv import aten, dispatch, families, launch, layouts, left, problem, record
from tconv.bench import compiler
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.problem import PASSES, Problem

HOPPER = Target("cuda", 90, 132)
GRADIENTS = {"backward_input", "backward_weight"}
PRODUCT = Case("2d_k1_wide", (8, 64, 9, 10), (64, 128, 1, 1))
WIDE_GROUPS = Case("wide groups", (2, 128, 16, 16), (128, 64, 3, 3), dict(stride=2, groups=2))
NARROW_GROUPS = Case("narrow groups", (2, 32, 16, 16), (32, 16, 3, 3), dict(stride=2, groups=2))
LONG_SUMS = Case("long sums", (1, 21, 2, 2), (21, 21, 64, 64), dict(stride=32))
DENSE, DEPTHWISE = by_id("2d_k4s2p1"), by_id("2d_depthwise")


def plans(case, dtype, target, tf32, monkeypatch, last=False):
    """The plan of each pass of a case."""
    input, weight, bias, grad = make(case, dtype, "cpu", last)
    geometry = tconv.explain(input, weight, **case.layer).geometry
    found = {}
    for name in PASSES:
        source, destination = (grad, input) if name == "backward_input" else (input, grad)
        monkeypatch.setattr(launch, "allow_tf32", lambda: tf32)
        of_forward = (weight, bias) if name == "forward" else ()
        problem = launch.make_problem(name, geometry, input.shape, grad.shape[1], source, destination, *of_forward)
        found[name] = dispatch.plan(problem, target)
    return found


@pytest.mark.parametrize(
    "case, dtype, tf32, left",
    [
        (WIDE_GROUPS, torch.float32, True, {"forward", *GRADIENTS}),
        (DENSE, torch.float16, False, GRADIENTS),
        (DENSE, torch.bfloat16, True, GRADIENTS),
        (DENSE, torch.float32, True, GRADIENTS),
        (WIDE_GROUPS, torch.float16, False, {"forward", *GRADIENTS}),
        (WIDE_GROUPS, torch.float32, False, set()),
        (DENSE, torch.float32, False, set()),
        (PRODUCT, torch.bfloat16, False, {"forward", *GRADIENTS}),
        (PRODUCT, torch.float32, True, {"forward", *GRADIENTS}),
        (PRODUCT, torch.float32, False, {"backward_input"}),
        (by_id("2d_groups3"), torch.float32, True, {"backward_input"}),  # so few channels are the direct kernels'
        (NARROW_GROUPS, torch.float32, True, GRADIENTS),  # of which cuDNN computes weights' in fp32
        (LONG_SUMS, torch.float32, True, set()),  # cuDNN's choice for torch is fp32
        (DEPTHWISE, torch.float32, True, {"backward_input"}),
        (DEPTHWISE, torch.float32, False, {"backward_input"}),
        (DEPTHWISE, torch.float16, False, {"backward_input"}),
    ],
)
def test_which(case, dtype, tf32, left, monkeypatch):
    told = plans(case, dtype, HOPPER, tf32, monkeypatch)
    assert {name for name, plan in told.items() if plan.family == "aten"} == left
    assert all("measured" in told[name].reason for name in left)
    for other in (Target("hip", 942, 304), Target("interpreter", 0, 4), Target("cuda", 90, 132, without=("aten",))):
        told = plans(case, dtype, other, tf32, monkeypatch)
        assert all(plan.family != "aten" for plan in told.values())


@pytest.mark.parametrize(
    "case, dtype, left",
    [
        (by_id("2d_groups3"), torch.bfloat16, True),
        (by_id("2d_groups3"), torch.float32, False),
        (DEPTHWISE, torch.bfloat16, False),
        (DENSE, torch.bfloat16, False),
    ],
)
def test_forward_in_channels_last(case, dtype, left, monkeypatch):
    """16-bit groups in channels_last, and no others."""
    for last in (False, True):
        told = plans(case, dtype, HOPPER, True, monkeypatch, last)["forward"]
        assert (told.family == "aten") == (left and last)


@pytest.mark.parametrize(
    "change, left",
    [
        ({}, True),
        (dict(aligned=True), False),  # the block kernel's, as the next ones
        (dict(aligned=True, dtype=torch.float32), False),
        (dict(aligned=True, source="vectors", destination="vectors"), False),
        (dict(source="vectors", destination="vectors"), False),
        (dict(geometry=Geometry((1, 1), (2, 2), (0, 0), (0, 0), 1, (1, 1))), False),
        (dict(geometry=Geometry((1, 1), (1, 1), (1, 0), (0, 0), 1, (1, 1))), False),
        (dict(c_out=32), False),
        (dict(large=True), False),
        (dict(dense=False), False),
        (dict(c_in=1024, c_out=1024, batch=1, input_size=(2, 2)), False),  # the column kernels'
    ],
)
def test_products_of_contiguous_matrices(change, left):
    geometry = Geometry((1, 1), (1, 1), (0, 0), (0, 0), 1, (1, 1))
    facts = dict(geometry=geometry, batch=4, c_in=128, c_out=256, input_size=(180, 180), dtype=torch.float16, tf32=True)
    plan = dispatch.plan(Problem("forward", **(facts | dict(source="width", weight="pieces") | change)), HOPPER)
    assert (plan.family == "aten") == left, plan
    assert (plan.family == "blocks") == change.get("aligned", False)


K4S2 = Geometry((4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1))
K3X5 = Geometry((3, 5), (1, 1), (0, 0), (0, 0), 1, (1, 1))


@pytest.mark.parametrize(
    "change, left",
    [
        ({}, True),
        (dict(bias=True), False),
        (dict(dtype=torch.float32), False),
        (dict(source="width", destination="width"), False),
        (dict(c_in=256), False),
        (dict(c_out=32), False),
        (dict(dense=False), False),
        (dict(geometry=Geometry((2, 2), (2, 2), (0, 0), (0, 0), 1, (1, 1))), False),  # no taps overlap
        (dict(geometry=K3X5, c_in=64, c_out=128), True),
        (dict(geometry=K3X5, c_in=64, c_out=64), False),
        (dict(geometry=Geometry((3, 3), (1, 1), (0, 0), (0, 0), 1, (1, 1)), c_in=64, c_out=128), False),  # not measured
        (dict(batch=1), False),
        (dict(geometry=Geometry((1, 1), (1, 1), (0, 0), (0, 0), 1, (1, 1)), c_in=64, c_out=128), False),
        (dict(batch=1, input_size=(2, 2)), False),  # the column kernels'
    ],
    ids=str,
)
def test_long_sums_in_channels_last(change, left):
    facts = dict(geometry=K4S2, batch=32, c_in=512, c_out=256, input_size=(16, 16), dtype=torch.bfloat16, tf32=True)
    facts |= dict(source="vectors", destination="vectors", weight="pieces", whole=(True, True), vector=16, aligned=True)
    plan = dispatch.plan(Problem("forward", **(facts | change)), HOPPER)
    assert (plan.family == "aten" and plan.reason == families.LEFT["sums"]) == left, plan


@pytest.mark.parametrize(
    "change, left",
    [
        ({}, True),
        (dict(dtype=torch.float32), True),
        (dict(dtype=torch.float32, tf32=False), False),
        (dict(input_size=(8, 8)), False),
        (dict(batch=64), False),
        (dict(c_out=48), False),
        (dict(source="width", destination="width"), False),
        (dict(geometry=Geometry((2, 2), (2, 2), (0, 0), (0, 0), 1, (1, 1))), False),
        (dict(geometry=Geometry((3, 3), (1, 1), (1, 1), (0, 0), 1, (1, 1)), bias=True), False),
    ],
)
def test_small_images_in_channels_last(change, left):
    """DreamerV3's first layer, and what is unlike it."""
    facts = dict(geometry=Geometry((4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)), batch=1024, c_in=256, c_out=128)
    facts |= dict(input_size=(4, 4), dtype=torch.bfloat16, tf32=True, source="vectors", destination="vectors") | change
    plan = dispatch.plan(Problem("forward", **facts), HOPPER)
    assert (plan.family == "aten") == left, plan
    assert dispatch.plan(Problem("forward", **facts), replace(HOPPER, without=("aten",))).family != "aten"


@pytest.mark.parametrize(
    "c_in, c_out, kernel, destination, expected",
    [
        (32, 16, 2, "vectors", "tf32"),  # UNETR's, as cuDNN computes it in channels_last
        (32, 16, 2, "width", "ieee"),
        (32, 20, 2, "channels", "tf32"),
        (16, 16, 2, "vectors", "ieee"),
        (32, 32, 2, "width", "tf32"),
        (16, 16, 6, "width", "tf32"),  # 144 products
    ],
)
def test_short_sums_at_tf32(c_in, c_out, kernel, destination, expected):
    geometry = Geometry((kernel, kernel), (2, 2), (0, 0), (0, 0), 1, (1, 1))
    facts = dict(batch=4, c_in=c_in, c_out=c_out, input_size=(48, 48), dtype=torch.float32, tf32=True, source="width")
    assert problem.precision(Problem("forward", geometry, destination=destination, **facts), HOPPER) == expected


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, "copied"),
        (dict(c_out=64), "left"),
        (dict(c_out=17), "left"),  # half of a tile's depth is padding
        (dict(c_out=17, source="channels"), "left"),
        (dict(source="vectors"), ""),
        (dict(kernel=2), "left"),
        (dict(kernel=2, source="vectors"), ""),
        (dict(kernel=2, tf32=True, c_out=12288), ""),  # sums too long for TF32
        (dict(c_out=33, source="channels"), ""),
        (dict(batch=1), ""),
        (dict(batch=32 << 10, c_in=16), ""),  # a copy of more than 1 GB
        (dict(c_out=130), "left"),
        (dict(dense=False), "left"),
        (dict(size=(192,)), ""),
        (dict(size=(4, 4, 12)), "copied"),
        (dict(size=(4, 4, 12), c_out=64), ""),
        (dict(size=(4, 4, 12), c_out=64, stride=1), "copied"),
        (dict(size=(4, 4, 12), kernel=2), "left"),
        (dict(size=(4, 4, 12), kernel=2, batch=4), ""),
    ],
    ids=str,
)
def test_inputs_gradients_in_ieee_fp32(change, expected):
    """Taps that overlap, of a large layer: its gradient is copied where it has many channels in whole pieces, or left."""
    facts = dict(batch=32, c_in=256, c_out=256, source="width", dense=True, kernel=4, size=(16, 12), stride=2) | change
    kernel, stride, size = (facts.pop(name) for name in ("kernel", "stride", "size"))
    n = len(size)
    geometry = Geometry((kernel,) * n, (stride,) * n, (0,) * n, (0,) * n, 1, (1,) * n)
    facts = dict(tf32=False) | facts | dict(input_size=size, dtype=torch.float32)
    plan = dispatch.plan(Problem("backward_input", geometry, **facts), HOPPER)
    assert (plan.family, plan.arranged) == ("aten" if expected == "left" else "gemm", expected == "copied")


@pytest.mark.parametrize(
    "change, copied",
    [
        ({}, True),
        (dict(c_out=30), False),
        (dict(c_in=28), False),
        (dict(source="vectors"), False),
        (dict(destination="vectors"), False),
        (dict(dense=False), False),
        (dict(tf32=True), False),
        (dict(kernel=1), False),  # of which most of the output's gradient would be copied for nothing
        (dict(batch=1 << 13), False),  # copies of more than 1 GB
    ],
    ids=str,
)
def test_weights_gradients_in_ieee_fp32_are_copied(change, copied):
    facts = dict(batch=4, c_in=64, c_out=64, source="width", dense=True, kernel=2, tf32=False) | change
    kernel = facts.pop("kernel")
    geometry = Geometry((kernel, kernel), (2, 2), (0, 0), (0, 0), 1, (1, 1))
    plan = dispatch.plan(
        Problem("backward_weight", geometry, input_size=(48, 48), dtype=torch.float32, **facts),
        replace(HOPPER, without=("aten", "grid")),
    )
    assert (plan.family, plan.arranged) == ("gemm", copied)


@pytest.mark.parametrize(
    "c_in, c_out, kernel, left",
    [(64, 64, 2, False), (68, 64, 2, True), (64, 64, 4, True), (60, 64, 4, False), (68, 48, 2, False)],
)
def test_which_gradients_of_inputs_are_copied(c_in, c_out, kernel, left):
    """At TF32 those of 64 channels of which each element meets more than 64 products: c_in * kernel^2 / stride^2."""
    geometry = Geometry((kernel, kernel), (2, 2), (0, 0), (0, 0), 1, (1, 1))
    facts = dict(batch=4, c_in=c_in, c_out=c_out, input_size=(48, 48), tf32=True, source="width")
    for dtype, arranged in ((torch.float32, left), (torch.bfloat16, c_in % 8 == 0)):
        plan = dispatch.plan(Problem("backward_input", geometry, dtype=dtype, **facts), HOPPER)
        assert (plan.family, plan.arranged) == ("aten", arranged)


def test_cudnn_switched_off(device):
    with dispatch.without():
        assert dispatch.target_of(torch.device(device)).without == ()
        with torch.backends.cudnn.flags(enabled=False):
            assert dispatch.target_of(torch.device(device)).without == ("aten",)
            assert dispatch.flags()[1] == ("aten",)


def test_without(device):
    """without() holds in every thread, for new kinds of calls and for known ones, and ends."""
    with (
        pytest.raises(
            ValueError, match="expected few, columns, long, patches, blocks, grid, rows, shift or aten, got 'gemm'"
        ),
        dispatch.without("gemm"),
    ):
        pass
    before = dispatch.flags()
    with dispatch.without("shift", "aten"):
        assert dispatch.target_of(torch.device(device)).without == ("shift", "aten")
        assert dispatch.flags() != before
    assert dispatch.flags() == before


@pytest.fixture
def leaving(monkeypatch, device):
    """The dispatch that users have; on the CPU as on a Hopper GPU, whose aten passes run there too."""
    if device == "cpu":
        for module in (launch, sys.modules["tconv.explain"]):
            monkeypatch.setattr(module, "target_of", lambda device: HOPPER)
    with dispatch.without():
        yield


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("case", [c for c in CASES if c.layer.get("groups", 1) == 1], ids=lambda c: c.id)
def test_gradients(case, last, device, leaving, monkeypatch):
    """What is left is what torch computes, in the memory format that the operators promise, also at a second call."""
    if last and case.ndim == 1:
        pytest.skip("1-d tensors have no channels_last")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    first = make(case, torch.float32, device, last)
    layer = tconv.explain(*first[:3], **case.layer).geometry
    for tensors in (first, make(case, torch.float32, device, last)):
        input, weight, _, grad = tensors
        exact = passes(ATEN[case.ndim], *(None if t is None else t.double() for t in tensors), **case.layer)
        known = len(record._records)
        results = (
            launch.backward_input(grad, weight, input.shape[2:], layer),
            launch.backward_weight(grad, input, layer),
        )
        formats = layouts.memory_format(grad, weight), layouts.memory_format(input, grad)
        for actual, expected, format in zip(results, exact[1:3], formats):
            promised = torch.empty(expected.shape, dtype=input.dtype, memory_format=format)
            assert (actual.dtype, actual.shape, actual.stride()) == (promised.dtype, promised.shape, promised.stride())
            assert errors(actual, expected)[1] < 2e-3
    if device == "cuda":  # the interpreter's launches are not repeated
        assert len(record._records) == known
        kinds = [key[0] for key in record._records]
        assert kinds.count("backward_input") == kinds.count("backward_weight") == 1
        assert set(kinds) <= {"backward_input", "backward_weight", "channels_last", "contiguous"}


COPIED = [
    Case("1-d", (5, 16, 24), (16, 8, 4), dict(stride=2, padding=1)),
    Case("2-d", (4, 8, 4, 6), (8, 24, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Case("3-d", (3, 16, 3, 4, 4), (16, 8, 2, 3, 2), dict(stride=(2, 1, 2))),
    Case("groups", (3, 32, 4, 4), (32, 8, 3, 3), dict(stride=2, groups=2)),
    Case("groups of 12", (3, 32, 4, 4), (32, 12, 3, 3), dict(stride=2, groups=2)),
    Case("pixels that are no whole vectors", (3, 16, 3, 5), (16, 8, 3, 3), dict(stride=2)),
    Case("channels that are no whole vectors", (4, 12, 4, 4), (12, 6, 3, 3), dict(stride=2)),
    Case("two matrices", (4, 16, 4, 4), (16, 8, 1, 1), {}),
    Case("of one tap", (4, 16, 4, 4), (16, 8, 1, 1), dict(stride=2)),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", COPIED, ids=lambda c: c.id)
def test_by_way_of_copies(case, dtype, device, leaving, monkeypatch):
    """Gradients of contiguous tensors by way of channels_last copies, and in parts of the batch; at a second call, too."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    monkeypatch.setattr(families, "LEFT_PRODUCTS", 16)
    monkeypatch.setattr(families, "LEFT_READ", 0)
    monkeypatch.setattr(families, "LEFT_CHANNELS", 0)
    monkeypatch.setattr(problem, "TF32_GROUP_CHANNELS", 8)
    dispatch.plan.cache_clear()
    record.forget()
    half = dtype is torch.bfloat16
    whole = "channels" not in case.id and "matrices" not in case.id
    for _ in range(2):
        tensors = input, weight, _, grad = make(case, dtype, device)
        exact = passes(ATEN[case.ndim], *(None if t is None else t.double() for t in tensors), **case.layer)
        explained = tconv.explain(*tensors[:3], **case.layer)
        _, of_input, of_weight = (p.plan for p in explained.passes)
        assert (of_input.family, of_weight.family) == ("aten", "aten")
        assert of_input.arranged == (whole and "pixels" not in case.id and (half or "groups" not in case.id))
        assert of_weight.arranged == whole
        in_parts = whole and not half
        assert of_weight.splits == (case.input[0] if in_parts else 1)
        assert ("of channels_last copies" in str(explained)) == whole
        assert ("parts of the batch" in str(explained)) == in_parts
        results = (
            launch.backward_input(grad, weight, input.shape[2:], explained.geometry),
            launch.backward_weight(grad, input, explained.geometry),
        )
        for actual, expected in zip(results, exact[1:3]):
            assert actual.is_contiguous() and actual.dtype == dtype and actual.shape == expected.shape
            assert errors(actual, expected)[1] < (4e-3 if half else 1e-3)
    dispatch.plan.cache_clear()


@pytest.mark.parametrize("case", COPIED, ids=lambda c: c.id)
def test_kernels_compile_without_aten(case, device, leaving):
    """As the benchmark prepares a run: nothing is computed of what is left, and all is of its shape."""
    input, weight, _, grad = make(case, torch.bfloat16, device)
    geometry = tconv.explain(input, weight, **case.layer).geometry
    record.forget()
    with patch.multiple(aten, **compiler.UNCOMPUTED):
        assert launch.backward_input(grad, weight, input.shape[2:], geometry).shape == input.shape
        assert launch.backward_weight(grad, input, geometry).shape == weight.shape
        both = launch.gradients(grad, input, weight, geometry, (True, True))
        assert [t.shape for t in both] == [input.shape, weight.shape]
    record.forget()


@pytest.fixture
def copied(monkeypatch):
    """The shapes of what is copied at first calls of a kind, with TF32's copies as 16 bits have them."""
    shapes, note = [], left._note_channels_last
    monkeypatch.setattr(left, "_note_channels_last", lambda noted, t: shapes.append(t.shape) or note(noted, t))
    monkeypatch.setattr(families, "LEFT_READ", 0)
    monkeypatch.setattr(families, "LEFT_CHANNELS", 0)
    dispatch.plan.cache_clear()
    record.forget()
    yield shapes
    dispatch.plan.cache_clear()
    record.forget()


@pytest.mark.parametrize("way", ("one call", "in parts", "one frozen"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", COPIED[:2] + COPIED[3:4], ids=lambda c: c.id)
def test_a_steps_gradients(case, dtype, way, device, leaving, monkeypatch, copied):
    """A step copies the output's gradient once, for one call of aten if nothing is summed in parts, and results are those of the
    passes by themselves."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    monkeypatch.setattr(problem, "TF32_GROUP_CHANNELS", 8)
    if way == "in parts":
        monkeypatch.setattr(families, "LEFT_PRODUCTS", 16)
    together, both = [], aten.gradients
    monkeypatch.setattr(aten, "gradients", lambda *args: together.append(1) or both(*args))
    input, weight, _, grad = make(case, dtype, device)
    geometry = tconv.explain(input, weight, **case.layer).geometry
    layer, half, frozen = geometry.layer, dtype is torch.bfloat16, way == "one frozen"
    for again in (False, True):
        leaves = [input.detach().requires_grad_(True), weight.detach().requires_grad_(not frozen)]
        output = TCONV[case.ndim](*leaves, None, *layer)
        copied.clear()
        together.clear()
        results = torch.autograd.grad(output, leaves[:1] if frozen else leaves, grad)
        alike = not frozen and (half or (way == "one call" and geometry.groups == 1))
        assert len(together) == alike
        if again and device == "cuda":
            assert not copied  # the launches are repeated
        elif alike:
            assert copied == [grad.shape, input.shape, weight.shape]
        elif geometry.groups == 1:
            assert copied == [grad.shape, weight.shape, input.shape][: 2 if frozen else 3]
        operators = torch.ops.tconv
        assert torch.equal(results[0], operators.backward_input(grad, weight, list(input.shape[2:]), *layer))
        assert results[0].stride() == input.stride()
        if not frozen:
            assert torch.equal(results[1], operators.backward_weight(grad, input, list(weight.shape[2:]), *layer))
            assert results[1].stride() == weight.stride()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients_in_channels_last_are_torchs_call(dtype, device, leaving, copied):
    """Of channels_last tensors nothing is copied, rounded or cut into parts, and both gradients come from one call."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    input, weight, _, grad = make(COPIED[1], dtype, device, True)
    layer = COPIED[1].layer
    told = tconv.explain(input, weight, **layer).passes[1:]
    assert all(p.plan == type(p.plan)("aten", families.LEFT[p.name]) for p in told)
    leaves = [t.detach().requires_grad_(True) for t in (input, weight)]
    results = torch.autograd.grad(tconv.conv_transpose2d(*leaves, None, **layer), leaves, grad)
    with aten.deterministic():
        expected = torch.autograd.grad(ATEN[2](*leaves, None, **layer), leaves, grad)
    for actual, as_torch in zip(results, expected):
        assert torch.equal(actual, as_torch) and actual.stride() == as_torch.stride()
    assert not copied


@pytest.mark.parametrize(
    "batch, pixels, parts",
    [(16, 16384, 4), (16, 1 << 20, 16), (1, 1 << 24, 1), (7, 65536, 7), (12, 49152, 12), (17, 65536, 16), (64, 64, 1)],
)
def test_parts(batch, pixels, parts, monkeypatch):
    """Of about 65,536 products each, at most 16, and alike where the batch allows it."""
    case = Case("parts", (batch, 64, 1, pixels), (64, 64, 3, 3), dict(padding=1))
    geometry = tconv.explain(*(torch.empty(s, device="meta") for s in (case.input, case.weight)), **case.layer).geometry
    monkeypatch.setattr(launch, "allow_tf32", lambda: True)
    tensors = (torch.empty((batch, 64, 1, pixels), device="meta") for _ in range(2))
    problem = launch.make_problem("backward_weight", geometry, case.input, 64, *tensors)
    assert dispatch.plan(problem, HOPPER).splits == parts


def test_deterministic_and_flags_restored(device, leaving):
    """cuDNN's deterministic algorithms run, and torch's flag is as before."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution_backward" in str(function):
                seen.append(torch.backends.cudnn.deterministic)
            return function(*args, **(kwargs or {}))

    input, weight, _, grad = make(DENSE, torch.float32, device)
    geometry = tconv.explain(input, weight, **DENSE.layer).geometry
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert not torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    before = torch.backends.cudnn.deterministic
    with Watch():
        launch.backward_input(grad, weight, input.shape[2:], geometry)
        launch.backward_weight(grad, input, geometry)
    assert seen == [True, True] and torch.backends.cudnn.deterministic == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", (DENSE, by_id("2d_channels_130"), DEPTHWISE), ids=lambda c: c.id)
def test_training_on_a_gpu(case, dtype, device, leaving):
    """The whole step through autograd, left passes among it, twice the same to the bit."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    tensors = make(case, dtype, device)
    told = tconv.explain(*tensors[:3], **case.layer).passes
    assert "aten" in {p.plan.family for p in told[1:]}
    one, two = (passes(TCONV[case.ndim], *tensors, **case.layer) for _ in range(2))
    expected = passes(ATEN[case.ndim], *tensors, **case.layer)
    for a, b, c in zip(one, two, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=2e-2, rtol=2e-2)
