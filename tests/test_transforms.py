"""autocast and torch.func: the same dtypes and values as torch's own convolution gives."""

import itertools

import pytest
import torch
from samples import NAMES, OURS, TORCHS, assert_near, each, sample
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tconv
from tconv import ops

# Autocast.  Half precision is compared loosely: exactness is test_passes' business, dtypes are ours.


def close_in_half(actual, expected):
    assert actual.dtype is expected.dtype
    assert actual.device == expected.device
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


HALF = pytest.mark.parametrize("half", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
# Dtypes of (input, weight, bias) as they come into autocast.
MIXES = {
    "all_float32": (torch.float32, torch.float32, torch.float32),
    "half_input": (None, torch.float32, torch.float32),
    "half_weight": (torch.float32, None, torch.float32),
    "half_bias": (torch.float32, torch.float32, None),
    "all_half": (None, None, None),
    "other_half_input": ("other", torch.float32, torch.float32),
    "no_bias": (torch.float32, torch.float32, "absent"),
}


def mixed(tensors, mix, half):
    other = torch.bfloat16 if half is torch.float16 else torch.float16
    dtypes = [{None: half, "other": other}.get(d, d) for d in mix]
    return [None if d == "absent" else t.detach().to(d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


@HALF
@pytest.mark.parametrize("mix", MIXES)
def test_autocast(mix, half, device):
    """Output in the autocast dtype, gradients in the dtype of each leaf."""
    case = sample("2d")
    leaves = mixed(case.tensors(device), MIXES[mix], half)
    present = [t for t in leaves if t is not None]
    results = []
    for function in (case.ours, case.aten):
        with torch.autocast(device, half):
            output = function(*leaves, **case.layer)
        results.append((output, *torch.autograd.grad(output.float().sum(), present)))
    assert results[0][0].dtype is half
    for ours, torchs in zip(*results, strict=True):
        close_in_half(ours, torchs)


@each([sample("1d"), sample("2d_depthwise"), sample("3d")])
def test_autocast_of_other_layers(sample, device):
    tensors = sample.tensors(device)
    with torch.autocast(device, torch.bfloat16):
        close_in_half(sample.ours(*tensors, **sample.layer), sample.aten(*tensors, **sample.layer))


def test_autocast_of_modules(device):
    ours, torchs = (kinds[2](3, 2, 3, stride=2, device=device) for kinds in (OURS, TORCHS))
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(1, 3, 3, 2, device=device)
    with torch.autocast(device, torch.bfloat16):
        close_in_half(ours(x), torchs(x))
        close_in_half(ours(x[0]), torchs(x[0]))
        with torch.autocast(device, enabled=False):
            assert ours(x).dtype is torch.float32


def test_autocast_leaves_float64_alone(device):
    """Torch's autocast does; so mixing it with float32 fails, and float64 by itself stays float64."""
    case = sample("1d")
    x, w, b = case.tensors(device, torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert case.ours(x, w, b, **case.layer).dtype is torch.float64
        for function in (case.ours, case.aten):
            with pytest.raises(RuntimeError, match="type"):
                function(x, w.float(), b, **case.layer)


@HALF
def test_without_autocast_mixed_dtypes_fail(half, device):
    case = sample("1d")
    x, w, b = case.tensors(device)
    for function in (case.ours, case.aten):
        with pytest.raises(RuntimeError, match="type"):
            function(x.to(half), w, b, **case.layer)


# torch.func


def same(ours, torchs):
    ours, torchs = (torch.utils._pytree.tree_leaves(t) for t in (ours, torchs))
    for a, b in zip(ours, torchs, strict=True):
        assert_near(a, b)


@pytest.fixture
def kernels_only(monkeypatch):
    """Fail where the call falls to aten, so that a comparison with torch is one with the kernels."""

    def fell(*_, **__):
        pytest.fail("the call fell to aten")

    monkeypatch.setattr(tconv.functional, "ATEN", dict.fromkeys((1, 2, 3), fell))


def both(sample, transform):
    """transform(f) of tconv's function and of torch's, f of the sample's layer."""
    return [
        transform(lambda *t, function=function: function(*t, **sample.layer)) for function in (sample.ours, sample.aten)
    ]


def loss_of(f):
    return lambda *t: f(*t).sin().sum()


@each()
def test_grad(sample, device, ieee, kernels_only):
    tensors = sample.tensors(device, requires_grad=False)
    same(*both(sample, lambda f: grad(loss_of(f), argnums=(0, 1, 2))(*tensors)))


@each([sample("1d_grouped"), sample("2d"), sample("2d_depthwise")])
def test_vjp(sample, device, ieee, kernels_only):
    tensors = sample.tensors(device, requires_grad=False)
    cotangent = torch.randn_like(sample.aten(*tensors, **sample.layer))
    same(*both(sample, lambda f: vjp(f, *tensors)[1](cotangent)))


def test_grad_of_grad(device, ieee, kernels_only):
    """Two levels of torch.func, and one level under ordinary autograd."""
    case = sample("1d")
    x, w, b = case.tensors(device)

    def twice(f):
        return grad(lambda x, w: grad(lambda w: loss_of(f)(x, w, b))(w).square().sum(), argnums=(0, 1))(x, w)

    def mixed_with_autograd(f):
        return torch.autograd.grad(grad(loss_of(f))(x, w, b).square().sum(), (x, w, b))

    same(*both(case, twice))
    same(*both(case, mixed_with_autograd))


IN_DIMS = [d for d in itertools.product((0, None), repeat=3) if any(i is not None for i in d)]


def mapped_along(tensors, in_dims, size=3):
    """Each tensor, with a new dimension of `size` different values where in_dims says so."""
    return tuple(
        t if d is None else torch.stack([t * (i + 1) for i in range(size)], dim=d)
        for t, d in zip(tensors, in_dims, strict=True)
    )


def names_of(in_dims):
    return "_".join(n for n, d in zip(NAMES, in_dims, strict=True) if d is not None)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=names_of)
@each([sample("1d"), sample("1d_grouped"), sample("2d_depthwise")])
def test_vmap(sample, in_dims, device, ieee, kernels_only):
    tensors = mapped_along(sample.tensors(device, requires_grad=False), in_dims)
    same(*both(sample, lambda f: vmap(f, in_dims)(*tensors)))


@pytest.mark.parametrize("in_dims", ((1, 1, 1), (2, None, 1), (-1, -1, -1), (None, 2, None)), ids=str)
def test_vmap_along_inner_dimensions(in_dims, device, ieee, kernels_only):
    case = sample("2d")
    tensors = mapped_along(case.tensors(device, requires_grad=False), in_dims)
    same(*both(case, lambda f: vmap(f, in_dims, out_dims=2)(*tensors)))


def test_vmap_without_bias_and_over_unbatched_inputs(device, ieee, kernels_only):
    case = sample("2d")
    x, w, _ = case.tensors(device, requires_grad=False)
    same(*both(case, lambda f: vmap(f, (0, None))(x, w)))
    assert torch.equal(vmap(lambda x: case.ours(x, w, **case.layer))(x), case.ours(x, w, **case.layer))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=names_of)
def test_vmap_is_one_launch(in_dims, device, monkeypatch):
    """The mapped dimension joins the batch or the groups: the operator runs once, not once a sample."""
    case = sample("1d")
    launches = []
    forward = ops.launch.forward
    monkeypatch.setattr(ops.launch, "forward", lambda *a: (launches.append(a), forward(*a))[1])
    vmap(lambda *t: case.ours(*t, **case.layer), in_dims)(
        *mapped_along(case.tensors(device, requires_grad=False), in_dims)
    )
    assert len(launches) == 1


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=names_of)
@each([sample("1d"), sample("2d_depthwise")])
def test_vmap_of_grad(sample, in_dims, device, ieee, kernels_only):
    """Every batching rule of the backward operators: gradients a sample."""
    tensors = mapped_along(sample.tensors(device, requires_grad=False), in_dims)
    same(*both(sample, lambda f: vmap(grad(loss_of(f), argnums=(0, 1, 2)), in_dims)(*tensors)))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=names_of)
def test_grad_of_vmap(in_dims, device, ieee, kernels_only):
    case = sample("1d_grouped")
    tensors = mapped_along(case.tensors(device, requires_grad=False), in_dims)
    same(*both(case, lambda f: grad(loss_of(vmap(f, in_dims)), argnums=(0, 1, 2))(*tensors)))


def test_vmap_of_grad_of_grad(device, ieee, kernels_only):
    case = sample("1d")
    in_dims = (0, None, None)
    x, w, b = mapped_along(case.tensors(device, requires_grad=False), in_dims)

    def penalty(f):
        inner = grad(loss_of(f), argnums=(0, 1, 2))
        return vmap(grad(lambda *t: sum(g.square().sum() for g in inner(*t)), argnums=(0, 1, 2)), in_dims)(x, w, b)

    same(*both(case, penalty))


def test_nested_vmap(device, ieee, kernels_only):
    """Inputs along one level, weights along the other."""
    case = sample("1d")
    x, w, b = case.tensors(device, requires_grad=False)
    x, w = mapped_along((x, w), (0, 0))
    w = w[:2]
    same(*both(case, lambda f: vmap(vmap(f, (None, 0, None)), (0, None, None))(x, w, b)))
    same(*both(case, lambda f: vmap(vmap(f, (0, None, None)), (0, 0, None))(torch.stack([x, x + 1]), w, b)))


@pytest.mark.parametrize("argnum", (0, 1, 2), ids=NAMES)
def test_jacrev(argnum, device, ieee, kernels_only):
    case = sample("1d_dilated")
    tensors = case.tensors(device, requires_grad=False)
    same(*both(case, lambda f: jacrev(f, argnums=argnum)(*tensors)))


def test_per_sample_gradients_of_a_module(device, ieee, kernels_only):
    """functional_call, vmap and grad together, as per-sample gradients are made."""
    gradients = []
    x = torch.randn(3, 3, 3, 2, device=device)
    state = None
    for kinds in (OURS, TORCHS):
        module = kinds[2](3, 2, 2, stride=2, device=device)
        state = state or {k: v.detach() for k, v in module.state_dict().items()}

        def loss(parameters, x, module=module):
            return functional_call(module, parameters, (x.unsqueeze(0),)).square().sum()

        gradients.append(vmap(grad(loss), (None, 0))(state, x))
    assert gradients[0].keys() == {"weight", "bias"}
    assert gradients[0]["weight"].shape == (3, *state["weight"].shape)
    same(*gradients)


def test_model_ensembling(device, ieee, kernels_only):
    """Stacked parameters of several modules, mapped over weight and bias."""
    modules = [OURS[1](3, 2, 3, device=device) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x = torch.randn(2, 3, 4, device=device)
    outputs = vmap(lambda p: functional_call(modules[0], p, (x,)))(parameters)
    same(outputs, torch.stack([m(x) for m in modules]))


# Forward mode runs aten: the operators have no tangent rules, and explain() says so.


def test_jvp(device, ieee):
    case = sample("2d")
    tensors = case.tensors(device, requires_grad=False)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    same(*both(case, lambda f: jvp(f, tensors, tangents)))


@pytest.mark.parametrize("transform", (jacfwd, hessian), ids=("jacfwd", "hessian"))
def test_forward_jacobians(transform, device, ieee):
    case = sample("1d_dilated")
    tensors = case.tensors(device, requires_grad=False)
    same(*both(case, lambda f: transform(lambda *t: f(*t).sin(), argnums=1)(*tensors)))


@each([sample("1d_grouped"), sample("2d"), sample("2d_depthwise")])
def test_jvp_of_vjp(sample, device, ieee):
    """The layer runs on the kernels; its gradients are then differentiated forwards."""
    tensors = sample.tensors(device, requires_grad=False)
    cotangent = torch.randn_like(sample.aten(*tensors, **sample.layer))
    same(*both(sample, lambda f: jvp(vjp(f, *tensors)[1], (cotangent,), (cotangent.cos(),))))
    same(
        *both(
            sample,
            lambda f: vmap(lambda t: jvp(vjp(f, *tensors)[1], (cotangent,), (t,)))(
                cotangent.expand(2, *cotangent.shape)
            ),
        )
    )


def test_dual_gradients(device, ieee):
    case = sample("1d")
    tensors = case.tensors(device)
    cotangent, tangent = (torch.randn_like(case.aten(*tensors, **case.layer)).detach() for _ in range(2))

    def run(f):
        output = f(*tensors)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(cotangent, tangent)
            grads = torch.autograd.grad(output, tensors, dual, create_graph=True)
            return [tuple(torch.autograd.forward_ad.unpack_dual(g)) for g in grads]

    same(*both(case, run))


def test_dual_tensors(device, ieee):
    case = sample("1d")
    x, w, b = case.tensors(device, requires_grad=False)
    tangent = torch.randn_like(x)

    def run(f):
        with torch.autograd.forward_ad.dual_level():
            y = f(torch.autograd.forward_ad.make_dual(x, tangent), w, b)
            return tuple(torch.autograd.forward_ad.unpack_dual(y))

    same(*both(case, run))


def test_forward_mode_is_explained(device):
    case = sample("1d")
    tensors = case.tensors(device, requires_grad=False)
    with torch.autograd.forward_ad.dual_level():
        passes = tconv.explain(*tensors, **case.layer).passes
    assert {(p.plan.family, p.plan.reason) for p in passes} == {("aten", "forward-mode differentiation runs aten")}
    assert {p.plan.family for p in tconv.explain(*tensors, **case.layer).passes} <= {"few", "gemm", "direct"}


# Calls go past torch's dispatcher where only autograd and the kernels would answer; these are not such calls.


@pytest.fixture
def small(device):
    torch.manual_seed(0)
    like = dict(dtype=torch.float64 if device == "cpu" else torch.float32, device=device)
    return torch.randn(1, 2, 2, 2, **like), torch.randn(2, 1, 2, 2, **like)


def test_batched_gradients(small, ieee):
    x, w = small
    for vectorize in (False, True):
        ours = torch.autograd.functional.jacobian(lambda x: tconv.conv_transpose2d(x, w), x, vectorize=vectorize)
        torch.testing.assert_close(
            ours, torch.autograd.functional.jacobian(lambda x: torch.nn.functional.conv_transpose2d(x, w), x)
        )
    leaf = x.clone().requires_grad_()
    y = tconv.conv_transpose2d(leaf, w)
    several = torch.randn(3, *y.shape, dtype=y.dtype, device=y.device)
    (batched,) = torch.autograd.grad(y, leaf, several, is_grads_batched=True, retain_graph=True)
    for found, one in zip(batched, several, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, leaf, one, retain_graph=True)[0])


def test_a_tensor_that_outlived_its_transform(small):
    x, w = small
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(x)
    torch.testing.assert_close(tconv.conv_transpose2d(leaked[0], w), tconv.conv_transpose2d(x, w))


def test_no_gradient_is_recorded_below_autograd(small):
    x, w = small
    w.requires_grad_()
    assert tconv.conv_transpose2d(x, w).requires_grad
    with torch._C._AutoDispatchBelowAutograd():
        assert not tconv.conv_transpose2d(x, w).requires_grad


def test_modes_see_the_operator(small):
    x, w = small
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        tconv.conv_transpose2d(x, w)
    assert any("tconv.conv_transpose" in name for name in seen)
