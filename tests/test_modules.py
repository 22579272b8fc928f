"""The modules, convert and revert, override, and the KernelBench face: torch's own in all but the kernels."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
from oracle import ATEN
from samples import OURS, TCONV, TORCHS, assert_near, sample
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tconv
from tconv import functional, kernelbench

EACH_N = pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
LAZY = {1: nn.LazyConvTranspose1d, 2: nn.LazyConvTranspose2d, 3: nn.LazyConvTranspose3d}


@pytest.fixture
def calls():
    """The calls that reach tconv while the test runs."""
    seen = []
    functional.observers.append(seen.append)
    yield seen
    functional.observers.remove(seen.append)


def image(n, device, batch=(2,), channels=3):
    return torch.randn(*batch, channels, *(2,) * n, device=device)


def pair(n, device, **options):
    """(ours, torch's), with the same parameters."""
    ours, torchs = (kinds[n](3, 2, 3, device=device, **options) for kinds in (OURS, TORCHS))
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


# The modules.

OPTIONS = {
    "defaults": {},
    "ints": dict(stride=2, padding=1, output_padding=1),
    "no_bias": dict(bias=False, dilation=2),
}


@EACH_N
@pytest.mark.parametrize("options", OPTIONS)
def test_module(n, options, device, ieee):
    ours, torchs = pair(n, device, **OPTIONS[options])
    assert repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    assert isinstance(ours, TORCHS[n])
    x = image(n, device)
    results = []
    for module in (ours, torchs):
        module.zero_grad()
        y = module(x)
        y.sin().sum().backward()
        results.append((y, *(p.grad for p in module.parameters())))
    for a, b in zip(*results, strict=True):
        assert_near(a, b)


@EACH_N
def test_same_seed_same_parameters(n, device):
    states = []
    for kinds in (OURS, TORCHS):
        torch.manual_seed(7)
        states.append(kinds[n](4, 6, 3, groups=2, device=device).state_dict())
    for name in ("weight", "bias"):
        assert torch.equal(states[0][name], states[1][name])


@EACH_N
def test_tuples_unbatched_and_output_size(n, device, ieee):
    strides, paddings = (2, 3, 2)[:n], (1, 0, 1)[:n]
    ours, torchs = pair(n, device, stride=strides, padding=paddings)
    x = image(n, device, ())
    size = [s - 2 * p + 3 + s - 1 for s, p in zip(strides, paddings, strict=True)]
    y = ours(x, output_size=size)
    assert y.shape == (2, *size)
    assert_near(y, torchs(x, output_size=size))
    assert_near(ours(x), torchs(x))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64), ids=str)
def test_device_and_dtype(dtype, device):
    module = tconv.ConvTranspose2d(3, 2, 3, device=device, dtype=dtype)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {(device, dtype)}
    assert module(image(2, device).to(dtype)).dtype is dtype
    assert module.to(torch.float32)(image(2, device)).dtype is torch.float32


def test_module_on_meta():
    module = tconv.ConvTranspose2d(3, 2, 3, stride=2, device="meta")
    assert module(image(2, "meta")).shape == (2, 2, 5, 5)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", (pickled, saved, copy.deepcopy, copy.copy), ids=lambda f: f.__name__)
def test_copies(copied, device):
    module = tconv.ConvTranspose2d(3, 2, 3, stride=2, device=device)
    twin = copied(module)
    x = image(2, device)
    assert type(twin) is tconv.ConvTranspose2d
    assert torch.equal(twin(x), module(x))


def test_state_dict_goes_both_ways(device):
    buffer = io.BytesIO()
    ours, torchs = (kinds[2](3, 2, 3, device=device) for kinds in (OURS, TORCHS))
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    torchs.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(ours.weight, torchs.weight)
    with torch.no_grad():
        torchs.weight.zero_()
    ours.load_state_dict(torchs.state_dict())
    assert ours.weight.eq(0).all()


# convert and revert.


def layer(n=2):
    return TORCHS[n](3, 3, 3, padding=1)


def tied_module():
    shared = layer()
    return nn.Sequential(shared, nn.ReLU(), shared)


def tied_weight():
    model = nn.Sequential(layer(), layer())
    model[1].weight = model[0].weight
    return model


def pruned():
    model = layer()
    prune.l1_unstructured(model, "weight", amount=0.5)
    return model


def frozen():
    model = layer().requires_grad_(False)
    model.bias.requires_grad_(True)
    return model


# What a model is, the layers that are to be converted (by name), and how many calls of tconv one pass makes.
MODELS = {
    "root": (layer, [""], 1),
    "sequential": (lambda: nn.Sequential(layer(), nn.Conv2d(3, 3, 1), layer()), ["0", "2"], 2),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Identity(), layer())), ["0.1"], 1),
    "tied_module": (tied_module, ["0"], 2),
    "tied_weight": (tied_weight, ["0", "1"], 2),
    "weight_norm": (lambda: parametrizations.weight_norm(layer()), [""], 1),
    "spectral_norm": (lambda: parametrizations.spectral_norm(layer()), [""], 1),
    "orthogonal_bias_too": (
        lambda: parametrize.register_parametrization(parametrizations.weight_norm(layer()), "bias", nn.Softplus()),
        [""],
        1,
    ),
    "old_weight_norm": (lambda: nn.utils.weight_norm(layer()), [""], 1),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(layer()), [""], 1),
    "pruned": (pruned, [""], 1),
    "frozen": (frozen, [""], 1),
    "nothing_to_do": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Upsample(scale_factor=2)), [], 0),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def build(name, device):
    make, layers, count = MODELS[name]
    return make().to(device), layers, count


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@EACH_MODEL
def test_convert_and_revert(name, device, ieee, calls):
    """Class and kernels change, and nothing else; then back."""
    model, layers, count = build(name, device)
    model.eval()  # spectral norm iterates in training
    kinds = [type(m) for m in model.modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    text, x = repr(model), image(2, device)
    before = model(x)
    assert not calls

    report = tconv.convert(model)
    assert (report.changed, report.left) == (layers, {})
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)] == parameters
    assert state.keys() == model.state_dict().keys()
    assert repr(model) == text
    assert not any(m.training for m in model.modules())
    assert_near(model(x), before)
    assert len(calls) == count

    again = tconv.convert(model)
    assert (again.changed, again.left) == ([], {})

    assert tconv.revert(model).changed == layers
    assert tconv.revert(model).changed == []
    if not any(map(parametrize.is_parametrized, model.modules())):  # those have a class an instance
        assert [type(m) for m in model.modules()] == kinds
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k])
    assert torch.equal(model(x), before)
    assert len(calls) == count


@EACH_N
def test_convert_every_dimension(n, device, ieee):
    model = layer(n).to(device)
    x = image(n, device)
    before = model(x)
    tconv.convert(model)
    assert type(model) is OURS[n]
    assert_near(model(x), before)
    tconv.revert(model)
    assert type(model) is TORCHS[n]


def test_training_flag_dtype_and_optimizer(device):
    model = nn.Sequential(layer(), layer()).to(device, torch.float16)
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tconv.convert(model)
    assert [m.training for m in model] == [True, False]
    old = model[0].weight.detach().clone()
    output = model(image(2, device).half())
    assert output.dtype is torch.float16
    output.sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, old)


def test_hooks_stay(device):
    model = nn.Sequential(layer()).to(device)
    seen = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    tconv.convert(model)
    model(image(2, device).requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.parametrize(
    "norm", (parametrizations.weight_norm, parametrizations.spectral_norm), ids=lambda f: f.__name__
)
def test_parametrizations_come_off_again(norm, device, ieee, calls):
    """Put on before or after conversion, removed after it: what remains is tconv's plain module."""
    for before in (True, False):
        model = layer().to(device)
        if before:
            norm(model)
        tconv.convert(model)
        if not before:
            norm(model)
        assert parametrize.is_parametrized(model)
        model.eval()
        x = image(2, device)
        normed = model(x)
        parametrize.remove_parametrizations(model, "weight")
        assert type(model) is tconv.ConvTranspose2d
        assert_near(model(x), normed)
    assert len(calls) == 4


def test_parametrized_modules_train(device, ieee):
    """The gradient reaches what is under the parametrization, as it does with torch's module."""
    model = parametrizations.weight_norm(layer().to(device))
    x = image(2, device)
    gradients = []
    for change in (lambda m: None, tconv.convert):
        change(model)
        gradients.append(torch.autograd.grad(model(x).sin().sum(), model.parameters()))
    assert len(gradients[0]) == 3
    for a, b in zip(*gradients, strict=True):
        assert_near(b, a)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_comes_off_again(device):
    model = nn.utils.weight_norm(layer().to(device))
    tconv.convert(model)
    nn.utils.remove_weight_norm(model)
    assert type(model) is tconv.ConvTranspose2d
    assert {n for n, _ in model.named_parameters()} == {"weight", "bias"}


def test_deepcopy_of_a_converted_parametrized_module(device):
    model = parametrizations.weight_norm(layer().to(device))
    tconv.convert(model)
    twin = copy.deepcopy(model)
    x = image(2, device)
    assert torch.equal(twin(x), model(x))
    assert isinstance(twin, tconv.ConvTranspose2d)


@EACH_N
def test_lazy_modules(n, device, calls):
    """Converted before the first input, they become tconv's at it; after it, they are ordinary."""
    x = image(n, device)
    early, late = (LAZY[n](2, 3, stride=2, device=device) for _ in range(2))
    assert tconv.convert(early).changed == [""]
    assert tconv.convert(early).changed == []
    assert early(x).shape == (2, 2, *(5,) * n)
    assert type(early) is OURS[n]
    assert len(calls) == 1

    late(x)
    assert len(calls) == 1
    assert tconv.convert(late).changed == [""]
    assert type(late) is OURS[n]
    assert repr(early) == repr(late)
    assert early.state_dict().keys() == late.state_dict().keys()
    for module in (early, late):
        assert tconv.revert(module).changed == [""]
        assert type(module) is TORCHS[n]
        assert b"tconv" not in pickle.dumps(module)


def test_lazy_modules_revert_before_their_first_input(device, calls):
    model = nn.Sequential(nn.LazyConvTranspose2d(2, 3, device=device))
    assert tconv.revert(model).changed == []
    tconv.convert(model)
    assert tconv.revert(model).changed == ["0"]
    model(image(2, device))
    assert type(model[0]) is nn.ConvTranspose2d
    assert not calls
    assert tconv.convert(nn.LazyConvTranspose2d(2, 3)).changed == [""]  # the class itself is as it was


class Doubled(nn.ConvTranspose2d):
    def forward(self, x):
        return 2 * torch.nn.functional.conv_transpose2d(x, self.weight, self.bias)


class FancyConvTranspose(nn.Module):
    def forward(self, x):
        return x


class ConvTransposeBlock(nn.Sequential):
    """A block of layers with such a name is none itself."""


class Named(tconv.ConvTranspose2d):
    """A subclass of tconv's own module: nothing to convert."""


def test_what_is_left_and_why(device, ieee, calls):
    block = ConvTransposeBlock(nn.Conv2d(3, 3, 1))
    model = nn.Sequential(Doubled(3, 3, 3), FancyConvTranspose(), Named(3, 3, 3), block).to(device)
    x = image(2, device)
    before = model(x)
    calls.clear()
    report = tconv.convert(model)
    assert report.changed == []
    assert report.left.keys() == {"0", "1"}
    assert "Doubled is a subclass of torch's module" in report.left["0"]
    assert "FancyConvTranspose is not a torch.nn transposed convolution" in report.left["1"]
    assert type(model[0]) is Doubled
    assert torch.equal(model(x), before)
    assert len(calls) == 1
    with tconv.override():
        assert_near(model(x), before)
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_left():
    model = nn.Sequential(torch.jit.script(layer()), torch.jit.script(nn.Conv2d(3, 3, 1)))
    assert tconv.convert(model).left == {"0": "scripted by torch.jit"}


def test_report_text():
    model = nn.Sequential(layer(), layer(), Doubled(3, 3, 3))
    reason = f"{__name__}.Doubled is a subclass of torch's module with code of its own"
    assert str(tconv.convert(model)).splitlines() == [
        "converted 2 transposed convolutions",
        "  0",
        "  1",
        "left 1",
        f"  2: {reason}",
    ]
    assert str(tconv.revert(model)).splitlines() == ["reverted 2 transposed convolutions", "  0", "  1"]
    assert str(tconv.convert(layer())) == "converted 1 transposed convolution\n  (the model itself)"
    assert str(tconv.convert(nn.ReLU())) == "converted 0 transposed convolutions"


@pytest.mark.parametrize("change", (tconv.convert, tconv.revert), ids=("convert", "revert"))
@pytest.mark.parametrize(
    "model", (None, "model", torch.zeros(1), nn.ConvTranspose2d), ids=("none", "str", "tensor", "class")
)
def test_not_a_module(change, model):
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module"):
        change(model)


# override.


@EACH_N
def test_override_reaches_functions_and_modules(n, device, ieee, calls):
    x = image(n, device)
    module = layer(n).to(device)
    before = module(x)
    with tconv.override():
        assert_near(module(x), before)
        assert_near(ATEN[n](x, module.weight, bias=module.bias, padding=1), before)
        assert_near(TCONV[n](x, module.weight, module.bias, padding=1), before)
    assert len(calls) == 3
    assert torch.equal(module(x), before)
    assert len(calls) == 3


def test_override_nests(device, calls):
    case = sample("1d")
    tensors = case.tensors(device)
    with tconv.override():
        with tconv.override():
            case.aten(*tensors, **case.layer)
        assert len(calls) == 1
        case.aten(*tensors, **case.layer)
    assert len(calls) == 2
    case.aten(*tensors, **case.layer)
    assert len(calls) == 2


def test_override_ends_with_an_exception(device, calls):
    case = sample("1d")
    tensors = case.tensors(device)
    with pytest.raises(RuntimeError, match=r"conv_transpose1d\(\): expected stride"), tconv.override():
        case.aten(*tensors, stride=0)
    calls.clear()
    case.aten(*tensors, **case.layer)
    assert not calls


def test_override_holds_for_its_thread(device, calls):
    case = sample("1d")
    tensors = case.tensors(device, requires_grad=False)
    with tconv.override():
        thread = threading.Thread(target=lambda: case.aten(*tensors, **case.layer))
        thread.start()
        thread.join()
        assert not calls
        case.aten(*tensors, **case.layer)
    assert len(calls) == 1


def test_override_trains(device, ieee):
    """Backward runs after the context has ended, on tconv's kernels still."""
    case = sample("2d")
    tensors = case.tensors(device)
    expected = torch.autograd.grad(case.aten(*tensors, **case.layer).sin().sum(), tensors)
    with tconv.override():
        output = case.aten(*tensors, **case.layer)
    assert "tconv" in output.grad_fn.name()
    for a, b in zip(torch.autograd.grad(output.sin().sum(), tensors), expected, strict=True):
        assert_near(a, b)


def test_override_leaves_the_rest_alone(device, calls):
    x = image(2, device)
    conv = nn.Conv2d(3, 3, 1, device=device)
    before = conv(x)
    with tconv.override():
        assert torch.equal(conv(x), before)
        assert torch.equal(x.relu(), torch.relu(x))
    assert not calls


# The KernelBench face.

REFERENCE = {1: kernelbench.ModelNew1d, 2: kernelbench.ModelNew, 3: kernelbench.ModelNew3d}


@EACH_N
def test_kernelbench_signatures(n):
    function = inspect.signature(getattr(kernelbench, f"triton_conv_transpose{n}d"))
    assert list(function.parameters)[:7] == ["x", "weight", "bias", "stride", "padding", "output_padding", "groups"]
    model = inspect.signature(REFERENCE[n])
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "bias"]
    assert list(model.parameters)[:8] == names
    assert model.parameters["bias"].default is False


@EACH_N
@pytest.mark.parametrize("as_tuple", (False, True), ids=("ints", "tuples"))
def test_kernelbench_model(n, as_tuple, device, ieee):
    """A state_dict of the reference, which calls its layer conv_transpose, fits; so do ints and tuples."""

    def arg(value):
        return (value,) * n if as_tuple else value

    ours = REFERENCE[n](3, 2, arg(3), stride=arg(2), padding=arg(1), output_padding=arg(1)).to(device)
    reference = TORCHS[n](3, 2, arg(3), stride=arg(2), padding=arg(1), output_padding=arg(1), bias=False).to(device)
    ours.load_state_dict({"conv_transpose.weight": reference.weight})
    x = image(n, device)
    expected = reference(x)
    assert_near(ours(x), expected)
    function = getattr(kernelbench, f"triton_conv_transpose{n}d")
    assert_near(function(x, reference.weight, None, arg(2), arg(1), arg(1)), expected)
