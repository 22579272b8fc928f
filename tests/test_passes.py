"""forward, backward_input, backward_weight and backward_bias against the fp64 oracle, over listed cases."""

import functools
import random
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, oracle, passes

import tconv
from tconv import dispatch, families, launch, layouts
from tconv.configs import Target

explain = sys.modules["tconv.explain"]  # the module, not the function of its name

TCONV = {1: tconv.conv_transpose1d, 2: tconv.conv_transpose2d, 3: tconv.conv_transpose3d}


@dataclass(frozen=True)
class Case:
    id: str
    input: tuple
    weight: tuple
    layer: dict = field(default_factory=dict)
    bias: bool = True

    @property
    def ndim(self):
        return len(self.weight) - 2


CASES = [
    Case("2d_k3s1", (2, 5, 6, 7), (5, 4, 3, 3)),
    Case("2d_k4s2p1", (2, 16, 5, 6), (16, 12, 4, 4), dict(stride=2, padding=1)),
    Case("2d_k2s2_stride_is_kernel", (2, 8, 4, 5), (8, 6, 2, 2), dict(stride=2)),
    Case("2d_k3s2p1op1", (1, 17, 4, 4), (17, 3, 3, 3), dict(stride=2, padding=1, output_padding=1), False),
    Case("2d_k1s2_kernel_below_stride", (1, 4, 3, 3), (4, 5, 1, 1), dict(stride=2, output_padding=1)),
    Case("2d_k2s5_kernel_below_stride", (1, 4, 3, 3), (4, 5, 2, 2), dict(stride=5, output_padding=3)),
    Case("2d_d2s2_gcd2", (1, 4, 4, 5), (4, 5, 3, 3), dict(stride=2, dilation=2, padding=1)),
    Case("2d_d4s6_gcd2_d3s2", (1, 4, 4, 5), (4, 5, 3, 4), dict(stride=(6, 2), dilation=(4, 3), padding=(2, 5))),
    Case("2d_d3s1_output_padding_below_dilation", (1, 4, 3, 3), (4, 2, 2, 2), dict(dilation=3, output_padding=2)),
    Case("2d_padding_beyond_kernel", (1, 3, 9, 9), (3, 2, 2, 2), dict(stride=2, padding=5)),
    Case("2d_one_pixel", (3, 20, 1, 1), (20, 18, 4, 4)),
    Case("2d_one_channel", (2, 1, 5, 5), (1, 1, 3, 3), dict(stride=2)),
    Case("2d_channels_21_to_3", (1, 21, 5, 5), (21, 3, 4, 4), dict(stride=2, padding=1)),
    Case("2d_channels_130", (1, 130, 3, 3), (130, 33, 2, 2), dict(stride=2)),
    Case("2d_asymmetric", (1, 6, 3, 8), (6, 5, 2, 5), dict(stride=(3, 1), padding=(0, 2), dilation=(1, 2))),
    Case("2d_groups3", (2, 18, 4, 5), (18, 5, 3, 3), dict(stride=2, groups=3)),
    Case("2d_groups2_wide", (1, 64, 3, 4), (64, 33, 3, 3), dict(stride=2, groups=2)),
    Case("2d_depthwise", (2, 9, 5, 6), (9, 1, 4, 4), dict(stride=2, padding=1, groups=9)),
    Case("2d_depthwise_multiplier3", (1, 6, 5, 4), (6, 3, 3, 3), dict(stride=2, groups=6)),
    Case("2d_groups_4_to_2", (1, 8, 4, 4), (8, 2, 3, 3), dict(stride=(1, 2), groups=2, dilation=2)),
    Case("1d_k16s8p4", (2, 12, 9), (12, 7, 16), dict(stride=8, padding=4)),
    Case("1d_k70s32", (1, 3, 5), (3, 2, 70), dict(stride=32)),
    Case("1d_depthwise_k12s2", (2, 6, 17), (6, 1, 12), dict(stride=2, padding=5, groups=6)),
    Case("1d_long", (1, 4, 300), (4, 4, 3), dict(stride=2, padding=1)),
    Case("3d_k2s2", (2, 6, 3, 2, 3), (6, 5, 2, 2, 2), dict(stride=2)),
    Case("3d_k3s2p1op1", (1, 5, 2, 3, 4), (5, 3, 3, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Case("3d_k3x1x2", (1, 4, 2, 3, 4), (4, 3, 3, 1, 2), dict(stride=(1, 2, 3), padding=(1, 0, 0))),
    Case("3d_depthwise", (1, 4, 3, 3, 4), (4, 1, 3, 3, 3), dict(stride=2, padding=1, groups=4)),
]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NAMES = ("forward", "backward_input", "backward_weight", "backward_bias")
# float64 runs on the kernels in the interpreter alone.
PRECISIONS = (*(() if torch.cuda.is_available() else ("float64",)), "ieee", "tf32", "float16", "bfloat16")


def by_id(name):
    return next(c for c in CASES if c.id == name)


def _draw(dtype, device, shape):
    return torch.randn(shape, device=device, dtype=torch.float64).to(dtype)


def make(case, dtype, device, channels_last=False):
    """Random (input, weight, bias, grad_output) of a case."""
    g = case.layer.get("groups", 1)
    draw = functools.partial(_draw, dtype, device)
    input, weight = draw(case.input), draw(case.weight)
    bias = draw((case.weight[1] * g,)) if case.bias else None
    shape = ATEN[case.ndim](
        torch.empty(case.input, device="meta"), torch.empty(case.weight, device="meta"), **case.layer
    )
    grad = draw(shape.shape)
    if channels_last:
        input, grad = (t.contiguous(memory_format=LAST[input.ndim]) for t in (input, grad))
    return input, weight, bias, grad


def check(case, precision, device, channels_last=False):
    dtype = getattr(torch, precision, torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    tensors = make(case, dtype, device, channels_last)
    actual = passes(TCONV[case.ndim], *tensors, **case.layer)
    plan = tconv.explain(*tensors[:3], **case.layer).passes
    assert all(p.plan.family in ("few", "columns", "long", "patches", "gemm", "direct") for p in plan)
    exact = oracle(case.ndim, *tensors, **case.layer)
    peer = passes(ATEN[case.ndim], *tensors, **case.layer)
    rounded = oracle(case.ndim, *tensors, tf32=True, **case.layer) if precision == "tf32" else exact
    for i, (name, a) in enumerate(zip(NAMES, actual)):
        what = f"{case.id} {name}"
        if precision == "float64":
            assert errors(a, exact[i])[1] < 1e-13, what
        elif i < 3 and plan[i].plan.precision == "tf32":
            # Against exact products of operands rounded to nearest even, where only the tensor core's summation is
            # left (cuDNN's own distance is 4e-7 to 1e-5; truncated operands would give 1e-3).
            assert errors(a, rounded[i])[1] < 4e-6, f"{what}: {errors(a, rounded[i])}"
        elif device == "cpu" or precision != "tf32":
            assert_no_worse(a, exact[i], peer[i], what)
        else:  # fp32 where cuDNN may have used TF32
            assert errors(a, exact[i])[1] < 1e-6, f"{what}: {errors(a, exact[i])}"
    if plan[0].plan.family in ("few", "columns", "long"):
        # Their layers must come right on the other kernels, too: of fewer or more pixels they do run there.
        with dispatch.without("few", "columns", "long", "aten"):
            other = TCONV[case.ndim](*tensors[:3], **case.layer)
        assert errors(other, exact[0])[1] < (1e-13 if precision == "float64" else 1e-2 if dtype.itemsize == 2 else 1e-3)
    return actual


def some(cases, precision):
    """All cases on a GPU; in the interpreter, which is slow, all in float64 and a listed few at other precisions."""
    few = ("2d_k4s2p1", "2d_k2s2_stride_is_kernel", "2d_d2s2_gcd2", "2d_channels_130", "2d_groups2_wide")
    few += ("2d_depthwise", "1d_k16s8p4", "3d_k3s2p1op1")
    everything = torch.cuda.is_available() or precision == "float64"
    return [pytest.param(c, precision, id=f"{c.id}-{precision}") for c in cases if everything or c.id in few]


@pytest.mark.parametrize("case, precision", [p for precision in PRECISIONS for p in some(CASES, precision)])
def test_against_the_oracle(case, precision, device):
    check(case, precision, device)


@pytest.mark.parametrize(
    "case, precision",
    [p for precision in ("tf32", "bfloat16") for p in some([c for c in CASES if c.ndim > 1], precision)],
)
def test_channels_last(case, precision, device):
    output = check(case, precision, device, channels_last=True)[0]
    if output.shape[1] > 1 and case.input[2:] != (1, 1):  # a single pixel has no memory format
        assert output.is_contiguous(memory_format=LAST[output.ndim])


SPLIT = [
    Case("2d_one_pixel_k4", (1, 130, 1, 1), (130, 20, 4, 4), dict(stride=2, padding=1)),
    Case("2d_k4s2p1_wide", (1, 130, 2, 3), (130, 20, 4, 4), dict(stride=2, padding=1)),
    Case("3d_k3s2_groups2", (1, 60, 2, 2, 2), (60, 20, 3, 3, 3), dict(stride=2, padding=1, groups=2), False),
]


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.id)
def test_small_grids_split_their_sums(case, precision, last, device, monkeypatch):
    others = "few", "columns", "aten"
    if device == "cpu":
        if precision not in ("float64", "bfloat16") or (precision == "bfloat16" and last):
            pytest.skip("the interpreter is slow")
        target = Target("interpreter", 0, 132, without=others)
        monkeypatch.setattr(launch, "target_of", lambda device: target)
        monkeypatch.setattr(explain, "target_of", launch.target_of)
    with dispatch.without(*others):
        check(case, precision, device, channels_last=last)
        input, weight, bias, _ = make(case, getattr(torch, precision, torch.float32), device, last)
        told = tconv.explain(input, weight, bias, **case.layer).passes
    assert told[0].plan.splits > 1 or case.id == "3d_k3s2_groups2" or input.itemsize == 2  # too few steps
    assert told[1].plan.splits > 1 and f"sum in {told[1].plan.splits} parts" in str(told[1])


@pytest.mark.parametrize(
    "size, c_in, c_out, input",
    [((3, 5), 36, 132, "copied"), ((3, 5), 32, 144, "copied"), ((2, 3, 2), 32, 36, ""), ((13,), 48, 36, "")],
    ids=str,
)
def test_gradients_of_copies(size, c_in, c_out, input, device, ieee, monkeypatch, request):
    """In IEEE fp32 the portable kernels read contiguous activations from copies with their channels innermost."""
    n = len(size)
    monkeypatch.setattr(families, "IEEE_INPUT_PRODUCTS", 0)
    request.addfinalizer(dispatch.plan.cache_clear)
    dispatch.plan.cache_clear()
    case = Case("copied", (4, c_in, *size), (c_in, c_out, *(3, 4, 2)[:n]), dict(stride=2, padding=1), False)
    tensors = make(case, torch.float32, device)
    with dispatch.without("aten", "columns", "grid"):
        _, of_input, of_weight, *_ = tconv.explain(*tensors[:2], **case.layer).passes
        actual = passes(TCONV[n], *tensors, **case.layer)
    assert (of_input.plan.family, of_input.plan.arranged) == ("gemm", input == "copied")
    assert (of_weight.plan.family, of_weight.plan.arranged) == ("gemm", True)
    assert "of copies of both activations with channels innermost" in str(of_weight)
    assert ("of a copy of the output's gradient with channels innermost" in str(of_input)) == of_input.plan.arranged
    exact = passes(ATEN[n], *(None if t is None else t.double() for t in tensors), **case.layer)
    for ours, truth in zip(actual[1:3], exact[1:3], strict=True):
        assert errors(ours, truth)[1] < 1e-6


@pytest.mark.parametrize("case, precision", some(CASES, "ieee"))
def test_bitwise_repeatable(case, precision, device):
    tensors = make(case, torch.float32, device)
    first, second = (passes(TCONV[case.ndim], *tensors, **case.layer) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_unreached_outputs_are_the_bias(device):
    """stride 4, dilation 2: odd outputs have no tap."""
    x, w = torch.randn(2, 3, 5, device=device), torch.randn(3, 4, 3, device=device)
    bias = torch.randn(4, device=device)
    y = tconv.conv_transpose1d(x, w, bias, stride=4, dilation=2)
    assert torch.equal(y[:, :, 1::2], bias[None, :, None].expand_as(y[:, :, 1::2]))
    assert tconv.conv_transpose1d(x, w, stride=4, dilation=2)[:, :, 1::2].eq(0).all()


def test_long_strides_and_dilations(device):
    """A tap's inverse times a phase passes 2^31; and axes too long for 32-bit indices go to aten."""
    x, w = torch.ones(1, 1, 1, device=device), torch.tensor([[[1.0, 2.0, 3.0]]], device=device)
    layer = dict(stride=80001, dilation=40000, padding=39995)
    assert torch.equal(tconv.conv_transpose1d(x, w, **layer), ATEN[1](x, w, **layer))
    plan = tconv.explain(x, w, **layer).passes[0].plan
    assert plan.family == "gemm"
    assert "too long" in tconv.explain(x, w, stride=2**26).passes[0].plan.reason
    assert torch.equal(tconv.conv_transpose1d(x, w, stride=2**26), ATEN[1](x, w, stride=2**26))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")), ids=str)
@pytest.mark.parametrize("precision", ("ieee", "tf32", "float16", "bfloat16"))
@pytest.mark.parametrize("name", ("2d_k4s2p1", "2d_depthwise", "2d_d2s2_gcd2"))
def test_nan_and_inf_go_where_torch_sends_them(name, precision, value, device):
    if device == "cpu" and (precision == "float16" or (value < 0 and precision != "tf32")):
        pytest.skip("the interpreter is slow")
    case = by_id(name)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    x, w, bias, grad = make(case, getattr(torch, precision, torch.float32), device)
    x[0, 1, 1, 2] = value
    grad[0, 1, 2, 1] = value
    # In float64, since cuDNN's fp16 turns some infinities into zeros.
    ours = passes(TCONV[case.ndim], x, w, bias, grad, **case.layer)
    torchs = passes(ATEN[case.ndim], *(t.double() for t in (x, w, bias, grad)), **case.layer)
    for a, b in zip(ours[:3], torchs[:3], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        assert torch.equal(a[a.isinf()].double(), b[b.isinf()])


def test_tf32_keeps_nans_and_rounds_to_even(device):
    """Through a 1x1 layer that passes one channel on: the rounding itself, on the values where it could go wrong."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    bits = [0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0x7F7FFFFF, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x00000001]
    expected = [0x3F800000, 0x3F804000, 0x3F800000, 0x3F802000, 0x7F800000, None, None, None, 0x00000000]
    x = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32, device=device)
    signal, weight = torch.zeros(1, 64, len(bits), device=device), torch.zeros(64, 16, 1, device=device)
    signal[0, 0], weight[0, 0] = x.view(torch.float32), 1
    assert tconv.explain(signal, weight).passes[0].plan.precision == "tf32"
    y = tconv.conv_transpose1d(signal, weight)[0, 0]
    for value, want in zip(y.cpu(), expected, strict=True):
        if want is None:
            assert value.isnan()
        else:
            assert value.view(torch.int32).item() == want


@pytest.mark.parametrize(
    "case",
    [
        Case("zero_batch", (0, 4, 5, 6), (4, 3, 3, 3)),
        Case("zero_size_output", (2, 4, 1, 6), (4, 3, 2, 3), dict(padding=(1, 0))),
        Case("zero_output_channels", (2, 4, 5), (4, 0, 3)),  # as on CUDA; torch's CPU kernels refuse it
        Case("zero_batch_depthwise", (0, 4, 5), (4, 1, 3), dict(groups=4)),
    ],
    ids=lambda c: c.id,
)
def test_empty(case, device):
    tensors = make(case, torch.float32, device)
    actual = passes(TCONV[case.ndim], *tensors, **case.layer)
    assert actual[0].numel() == 0
    assert all(t.eq(0).all() for t in actual[1:])


@pytest.mark.parametrize("unbatched", (False, True), ids=("batched", "unbatched"))
@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x[:, :, ::2, 1:], w),
        lambda x, w: (x.transpose(2, 3), w),
        lambda x, w: (x[:, :1].expand_as(x), w[:, :, :1].expand_as(w)),
        lambda x, w: (x, w.transpose(2, 3)),
        lambda x, w: (x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3), w.to(memory_format=torch.channels_last)),
        lambda x, w: (torch.cat([x.flatten(), x.new_zeros(1)])[1:].view(x.shape), w),
    ],
    ids=("sliced", "transposed", "expanded", "weight_transposed", "batch_inside", "odd_offset"),
)
def test_any_strides(change, unbatched, device):
    case = Case("strides", (3, 8, 6, 7), (8, 6, 4, 4), dict(stride=2, padding=1))
    x, w, bias, _ = make(case, torch.float32, device)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    x, w = change(x, w)
    x = x[0] if unbatched else x
    y = tconv.conv_transpose2d(x, w, bias, **case.layer)
    exact = ATEN[2](x.double(), w.double(), bias.double(), **case.layer)
    assert_no_worse(y, exact, ATEN[2](x, w, bias, **case.layer))
    assert y.stride() == ATEN[2](x, w, bias, **case.layer).stride()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case("large_output", (5, 16, 4096, 2048), (16, 16, 2, 2), dict(stride=2), False),
        Case("large_input", (5, 48, 4096, 2304), (48, 16, 3, 3), dict(padding=1), False),
        Case("large_depthwise", (2, 24, 4096, 3000), (24, 1, 4, 4), dict(stride=2, padding=1, groups=24), False),
    ],
    ids=lambda c: c.id,
)
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "channels_last"))
def test_more_than_2_31_elements(case, channels_last, reserve):
    """Checked on the first and the last sample, which lie on both sides of a 32-bit offset."""
    reserve(60 * 10**9)
    x = torch.randn(case.input, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(case.weight, device="cuda", dtype=torch.bfloat16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = tconv.conv_transpose2d(x, w, **case.layer)
    assert max(x.numel(), y.numel()) > 2**31
    groups = case.layer.get("groups", 1)
    for n in (0, -1):
        exact = ATEN[2](x[n].unsqueeze(0).double(), w.double(), **case.layer)
        assert errors(y[n].unsqueeze(0), exact)[1] < 4e-3
        del exact
    grad = torch.zeros_like(y)
    grad[0], grad[-1] = torch.randn_like(y[0]), torch.randn_like(y[0])
    del y
    layer = (case.layer.get("stride", 1),) * 2, (case.layer.get("padding", 0),) * 2, (0, 0), groups, (1, 1)
    gx = torch.ops.tconv.backward_input(grad, w, x.shape[2:], *layer)
    gw = torch.ops.tconv.backward_weight(grad, x, w.shape[2:], *layer)
    exact_w = torch.zeros_like(w, dtype=torch.float64)
    for n in (0, x.shape[0] - 1):
        xs = x[n : n + 1].double().requires_grad_(True)
        ws = w.double().requires_grad_(True)
        a, b = torch.autograd.grad(ATEN[2](xs, ws, **case.layer), (xs, ws), grad[n : n + 1].double())
        assert errors(gx[n : n + 1], a)[1] < 4e-3
        exact_w += b
    assert errors(gw, exact_w)[1] < 4e-3


def test_memory_format_is_what_torch_suggests():
    """Of dense, padded, overlapping and expanded tensors of all ranks, with sizes of 0 and 1."""
    from torch._prims_common import suggest_memory_format

    rng, suggested = random.Random(0), set()
    for _ in range(5000):
        sizes = [rng.choice((0, 1, 1, 2, 3, 4)) for _ in range(rng.choice((3, 4, 4, 5, 5)))]
        order = [0, *range(2, len(sizes)), 1] if rng.random() < 0.5 else rng.sample(range(len(sizes)), len(sizes))
        strides, step = [0] * len(sizes), 1
        for i in reversed(order):
            strides[i] = rng.choice((step, step, step, rng.randrange(9)))
            step = strides[i] * max(1, sizes[i]) + rng.choice((0, 0, 0, 1))
        t = torch.empty_strided(sizes, strides, device="meta")
        assert layouts.memory_format(t) == suggest_memory_format(t), (sizes, strides)
        suggested.add(layouts.memory_format(t))
    assert suggested == {torch.contiguous_format, torch.channels_last, torch.channels_last_3d}


def test_memory_format_imports_no_sympy():
    """It would be seconds of a first call."""
    code = "import sys, torch; from tconv import layouts; layouts.memory_format(torch.empty(1, 1, 1, 1)); print('sympy' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "False"


def test_offsets_that_pass_31_bits_beyond_the_border(device):
    """Rows 2^28 elements apart: taps reach beyond the input's last, where 32 bits would wrap."""
    far = 2**28
    x = torch.empty(7 * far + 1000, dtype=torch.float16, device=device).as_strided((1, 2, 8, 16), (1, 64, far, 1))
    x.copy_(torch.randn(1, 2, 8, 16))
    w = torch.randn(2, 1, 3, 3, device=device).half()
    assert layouts.is_large(x, tconv.geometry.Geometry((3, 3), (1, 1), (0, 0), (0, 0), 2, (1, 1)))
    torch.testing.assert_close(
        tconv.conv_transpose2d(x, w, groups=2), tconv.conv_transpose2d(x.contiguous(), w, groups=2)
    )
