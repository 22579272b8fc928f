"""Bad input raises torch's exception, names the argument and reaches no kernel."""

from dataclasses import dataclass

import pytest
import torch
from oracle import ATEN
from samples import OURS, TCONV, TORCHS

from tconv import functional, launch


@dataclass(frozen=True)
class Bad:
    """What to change in a good call of n spatial axes, the exception that follows, and what its text names."""

    id: str
    change: object  # n -> {argument: value}
    error: type
    text: str
    torch_differs: str = ""  # why torch (on the CPU, at least) does not raise this type for this call


def one(n, value, rest):
    """`value` along the last axis, `rest` along the others."""
    return (rest,) * (n - 1) + (value,)


def always(**change):
    return lambda n: change


def rank(dims, first=()):
    return torch.randn(*first, *(3,) * dims)


BAD = [
    # Shapes.
    Bad("input_rank_low", lambda n: dict(input=rank(n)), RuntimeError, "input"),
    Bad("input_rank_high", lambda n: dict(input=rank(n + 3)), RuntimeError, "input"),
    Bad("input_rank_0", always(input=torch.tensor(1.0)), RuntimeError, "input"),
    Bad("input_channels", lambda n: dict(input=rank(n, (2, 3))), RuntimeError, "input.* 4 channels"),
    Bad("input_channels_unbatched", lambda n: dict(input=rank(n, (3,))), RuntimeError, "input.* 4 channels"),
    Bad("input_channels_0", lambda n: dict(input=rank(n, (2, 0))), RuntimeError, "input.* 4 channels"),
    Bad("weight_rank_low", lambda n: dict(weight=rank(n - 1, (4, 2))), RuntimeError, "weight"),
    Bad("weight_rank_high", lambda n: dict(weight=rank(n + 1, (4, 2))), RuntimeError, "weight"),
    Bad("weight_rank_0", always(weight=torch.tensor(1.0)), RuntimeError, "weight"),
    Bad("bias_size", always(bias=torch.randn(3)), RuntimeError, "bias"),
    Bad("bias_size_1", always(bias=torch.randn(1)), RuntimeError, "bias"),
    Bad("bias_rank_0", always(bias=torch.tensor(1.0)), RuntimeError, "bias"),
    Bad("bias_rank_2", always(bias=torch.randn(2, 1)), RuntimeError, "bias"),
    Bad("no_input_channels", lambda n: dict(input=rank(n, (2, 0)), weight=rank(n, (0, 2))), RuntimeError, "weight"),
    Bad("empty_kernel", lambda n: dict(weight=torch.randn(4, 2, *one(n, 0, 2))), RuntimeError, "weight"),
    Bad("empty_axis", lambda n: dict(input=torch.randn(2, 4, *one(n, 0, 3))), RuntimeError, "input"),
    Bad("empty_axis_unbatched", lambda n: dict(input=torch.randn(4, *one(n, 0, 3))), RuntimeError, "input"),
    # groups.
    Bad("groups_not_a_divisor", always(groups=3, bias=None), RuntimeError, "groups"),
    Bad("groups_0", always(groups=0), RuntimeError, "groups"),
    Bad("groups_negative", always(groups=-1), RuntimeError, "groups"),
    Bad("groups_float", always(groups=1.0), TypeError, "groups"),
    Bad("groups_bool", always(groups=True), TypeError, "groups"),
    Bad("groups_none", always(groups=None), TypeError, "groups"),
    Bad("groups_tuple", always(groups=(1,)), TypeError, "groups"),
    # Ranges.
    Bad("stride_0", always(stride=0), RuntimeError, "stride"),
    Bad("stride_negative", always(stride=-1), RuntimeError, "stride"),
    Bad("stride_0_on_one_axis", lambda n: dict(stride=one(n, 0, 2)), RuntimeError, "stride"),
    Bad("dilation_0", always(dilation=0), RuntimeError, "dilation"),
    Bad("dilation_negative", always(dilation=-1), RuntimeError, "dilation"),
    Bad("dilation_0_on_one_axis", lambda n: dict(dilation=one(n, 0, 2)), RuntimeError, "dilation"),
    Bad("padding_negative", always(padding=-1), RuntimeError, "padding"),
    Bad("padding_negative_on_one_axis", lambda n: dict(padding=one(n, -1, 0)), RuntimeError, "padding"),
    Bad("padding_too_large", always(padding=5), RuntimeError, "padding"),
    Bad("padding_too_large_on_one_axis", lambda n: dict(padding=one(n, 5, 0)), RuntimeError, "padding"),
    Bad("padding_too_large_zero_batch", lambda n: dict(input=rank(n, (0, 4)), padding=5), RuntimeError, "padding"),
    Bad("padding_huge", always(padding=2**62), RuntimeError, "padding"),
    Bad("output_padding_negative", always(output_padding=-1), RuntimeError, "output_padding"),
    Bad("output_padding_1", always(output_padding=1), RuntimeError, "output_padding"),
    Bad("output_padding_is_stride", always(output_padding=2, stride=2), RuntimeError, "output_padding"),
    Bad("output_padding_is_dilation", always(output_padding=3, dilation=3), RuntimeError, "output_padding"),
    Bad(
        "output_padding_on_one_axis",
        lambda n: dict(output_padding=one(n, 1, 0), stride=one(n, 1, 2)),
        RuntimeError,
        "output_padding",
    ),
    # Tensors that do not go together.
    Bad("weight_dtype", lambda n: dict(weight=rank(n, (4, 2)).half()), RuntimeError, "weight"),
    Bad("weight_dtype_int", lambda n: dict(weight=rank(n, (4, 2)).int()), RuntimeError, "weight"),
    Bad("bias_dtype", always(bias=torch.randn(2).half()), RuntimeError, "bias"),
    Bad("bias_dtype_wider", always(bias=torch.randn(2).double()), RuntimeError, "bias"),
    Bad("weight_device", lambda n: dict(weight=rank(n, (4, 2)).to("meta")), RuntimeError, "weight", "returns meta"),
    Bad("bias_device", always(bias=torch.randn(2, device="meta")), RuntimeError, "bias", "returns meta"),
    # Not tensors at all.
    Bad("input_list", always(input=[1.0]), TypeError, "input"),
    Bad("input_none", always(input=None), TypeError, "input"),
    Bad("weight_none", always(weight=None), TypeError, "weight"),
    Bad("weight_array", lambda n: dict(weight=rank(n, (4, 2)).numpy()), TypeError, "weight"),
    Bad("bias_list", always(bias=[1.0, 2.0]), TypeError, "bias"),
    Bad("bias_float", always(bias=1.0), TypeError, "bias"),
    # Not (tuples of) ints: the same for each of the four spatial arguments.
    *(
        Bad(f"{name}_{what}", lambda n, name=name, value=value: {name: value(n)}, error, name)
        for name in ("stride", "padding", "output_padding", "dilation")
        for what, value, error in (
            ("too_long", lambda n: (1,) * (n + 1), RuntimeError),
            ("empty", lambda n: (), RuntimeError),
            ("float", lambda n: 1.0, TypeError),
            ("float_inside", lambda n: one(n, 1.0, 1), TypeError),
            ("str", lambda n: "same", TypeError),
            ("none", lambda n: None, TypeError),
            ("bool", lambda n: True, TypeError),
            ("nested", lambda n: ((1,) * n,) * n, TypeError),
            ("tensor_of_floats", lambda n: torch.tensor(1.0), TypeError),
            ("range", lambda n: range(1, n + 1), TypeError),
        )
    ),
]


def good(n, device):
    return dict(input=rank(n, (2, 4)).to(device), weight=rank(n, (4, 2)).to(device), bias=torch.randn(2, device=device))


def arguments(bad, n, device):
    change = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for k, v in bad.change(n).items()
    }
    return good(n, device) | change


def raised(function, kwargs):
    """The exception a call raises, or None."""
    try:
        function(**kwargs)
    except Exception as error:
        return error
    return None


@pytest.fixture
def nothing_runs(monkeypatch):
    def ran(*_, **__):
        pytest.fail("an operator or a kernel was reached")

    monkeypatch.setattr(functional.ops, "conv_transpose", ran)
    for name in ("forward", "decide"):
        monkeypatch.setattr(launch, name, ran)


def test_the_guard_itself(device, nothing_runs):
    with pytest.raises(pytest.fail.Exception):
        TCONV[2](**good(2, device))


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.id)
def test_bad_input(bad, n, device, nothing_runs):
    kwargs = arguments(bad, n, device)
    with pytest.raises(bad.error, match=bad.text) as ours:
        TCONV[n](**kwargs)
    assert ours.type is bad.error
    torchs = raised(ATEN[n], kwargs)
    if bad.torch_differs:
        assert device != "cpu" or torchs is None, f"torch raises too: {torchs!r}"
    elif device == "cpu":
        assert type(torchs) is bad.error, f"torch: {torchs!r}"
    else:  # CUDA libraries raise subclasses for what torch itself does not check
        assert isinstance(torchs, bad.error), f"torch: {torchs!r}"


ORDER = ("stride", "padding", "output_padding", "groups", "dilation")


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.id)
def test_bad_input_after_a_good_call(bad, device, request):
    """A call like an earlier one skips the checks one by one; what only equals it (1.0 equals 1) does not."""
    layer = dict(stride=(1, 1), padding=(1, 1), output_padding=(0, 0), groups=1, dilation=(1, 1))
    first = good(2, device)
    TCONV[2](**first, **layer)
    if device == "cuda" or functional.refuse(*first.values()) is None:
        key = functional._key(2, *first.values(), *(layer[k] for k in ORDER))
        assert functional._passed.get(key) is not None
    change = {k: v for k, v in arguments(bad, 2, device).items() if k in bad.change(2)}
    request.getfixturevalue("nothing_runs")
    with pytest.raises(bad.error, match=bad.text):
        TCONV[2](**first | layer | change)


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
def test_the_text_names_the_function(n, device):
    with pytest.raises(RuntimeError, match=rf"^conv_transpose{n}d\(\): expected stride to be positive, got stride="):
        TCONV[n](**good(n, device), stride=0)


def test_what_stands_for_an_int_is_one(device, ieee):
    """NumPy's ints, tensors of one int, lists and one-tuples, as torch takes them."""
    numpy = pytest.importorskip("numpy")
    kwargs = good(2, device)
    expected = ATEN[2](**kwargs, stride=2, groups=1)
    for two, group in ((numpy.int64(2), numpy.int32(1)), (torch.tensor(2), torch.tensor(1)), ([2, 2], 1), ((2,), 1)):
        torch.testing.assert_close(TCONV[2](**kwargs, stride=two, groups=group), expected)
        assert torch.equal(ATEN[2](**kwargs, stride=two, groups=group), expected)


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
def test_meta_tensors(n):
    """Shapes without data: they pass the same checks and never reach a kernel."""
    kwargs = good(n, "meta")
    y = TCONV[n](**kwargs, stride=2)
    assert y.device.type == "meta"
    assert y.shape == ATEN[n](**kwargs, stride=2).shape
    with pytest.raises(RuntimeError, match="padding"):
        TCONV[n](**kwargs, padding=5)


@pytest.mark.parametrize("dtype", (torch.int32, torch.bool), ids=str)
def test_dtypes_without_a_convolution(dtype, device, nothing_runs):
    """Left to torch, error and all."""
    kwargs = {k: t.to(dtype) for k, t in good(2, device).items()}
    ours, torchs = raised(TCONV[2], kwargs), raised(ATEN[2], kwargs)
    assert type(ours) is type(torchs) is not type(None)


CONSTRUCTOR = [
    ("in_channels_not_divisible", dict(in_channels=5, out_channels=4, kernel_size=2, groups=2)),
    ("out_channels_not_divisible", dict(in_channels=4, out_channels=5, kernel_size=2, groups=2)),
    ("groups_0", dict(in_channels=4, out_channels=4, kernel_size=2, groups=0)),
    ("padding_mode", dict(in_channels=4, out_channels=4, kernel_size=2, padding_mode="circular")),
    ("padding_mode_unknown", dict(in_channels=4, out_channels=4, kernel_size=2, padding_mode="sideways")),
    ("padding_str", dict(in_channels=4, out_channels=4, kernel_size=2, padding="same")),
    ("channels_negative", dict(in_channels=-4, out_channels=4, kernel_size=2)),
    ("channels_float", dict(in_channels=4.0, out_channels=4, kernel_size=2)),
]


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
@pytest.mark.parametrize("kwargs", [k for _, k in CONSTRUCTOR], ids=[i for i, _ in CONSTRUCTOR])
def test_constructor(kwargs, n):
    ours, torchs = raised(OURS[n], kwargs), raised(TORCHS[n], kwargs)
    if torchs is None:  # padding="same" passes torch's constructor too, and fails at the call
        assert ours is None
        with pytest.raises(TypeError, match="padding"):
            OURS[n](**kwargs)(rank(n, (2, 4)))
    else:
        assert type(ours) is type(torchs)
        assert str(ours) == str(torchs)


def layer_pair(n, device):
    ours, torchs = (
        kinds[n](4, 2, 3, stride=2, padding=1, device=device, dtype=torch.float32) for kinds in (OURS, TORCHS)
    )
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
@pytest.mark.parametrize("unbatched", (False, True), ids=("batched", "unbatched"))
@pytest.mark.parametrize(
    "extra",
    [
        ("missing", lambda n: (5,) * (n - 1)),
        ("too_many", lambda n: (2, 2, 2) + (5,) * n),
        ("too_small", lambda n: one(n, 4, 5)),
        ("too_large", lambda n: one(n, 7, 6)),
    ],
    ids=lambda e: e[0],
)
def test_bad_output_size(extra, unbatched, n, device, nothing_runs):
    x = rank(n, (4,) if unbatched else (2, 4)).to(device)
    ours, torchs = (raised(m, dict(input=x, output_size=extra[1](n))) for m in layer_pair(n, device))
    assert type(ours) is type(torchs) is ValueError
    assert "size" in str(ours)
    assert str(ours) == str(torchs)


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
@pytest.mark.parametrize("unbatched", (False, True), ids=("batched", "unbatched"))
@pytest.mark.parametrize("full", (False, True), ids=("spatial", "full_shape"))
@pytest.mark.parametrize("last", (5, 6))
def test_good_output_size(last, full, unbatched, n):
    lead = (4,) if unbatched else (2, 4)
    size = one(n, last, 6)
    x = rank(n, lead).to("meta")
    ours, torchs = (m(x, output_size=list((*lead, *size) if full else size)) for m in layer_pair(n, "meta"))
    assert ours.shape == torchs.shape
    assert ours.shape[-n:] == size


@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
def test_output_size_pads_the_far_side(n, device, ieee):
    x = rank(n, (1, 4)).to(device)
    ours, torchs = (m(x, output_size=one(n, 6, 5)) for m in layer_pair(n, device))
    torch.testing.assert_close(ours, torchs)


def test_module_rejects_what_the_function_rejects(device, nothing_runs):
    for module in layer_pair(2, device):
        assert isinstance(raised(module, dict(input=rank(2, (2, 5)).to(device))), RuntimeError)
        assert isinstance(raised(module, dict(input=rank(4, (1, 4)).to(device))), RuntimeError)
