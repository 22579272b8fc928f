"""The operators torch knows: schemas, fakes, autograd, batching rules.

Four operators, closed under differentiation: each is linear in each of its tensors and its
derivatives are the others, so gradients of any order run on the same kernels.
Inputs are batched and checked (functional.py does both); spatial arguments have one entry an axis.
"""

from __future__ import annotations

from functools import cache

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.library import Library, register_fake, register_vmap

from . import aten, launch, layouts
from .dispatch import PLAIN
from .geometry import Geometry, make_geometry

_LAYER = "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt groups, SymInt[] dilation"
library = Library("tconv", "DEF")
library.define(
    f"conv_transpose(Tensor input, Tensor weight, Tensor? bias, {_LAYER}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"backward_input(Tensor grad_output, Tensor weight, SymInt[] input_size, {_LAYER}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"backward_weight(Tensor grad_output, Tensor input, SymInt[] kernel_size, {_LAYER}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define("backward_bias(Tensor grad_output) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _geometry(kernel, layer) -> Geometry:
    stride, padding, output_padding, groups, dilation = layer
    facts = tuple(kernel), tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation)
    try:
        return make_geometry(*facts)
    except TypeError:  # symbolic sizes have no hash
        return Geometry(*facts)


def _conv_transpose(input, weight, bias, *layer):
    return launch.forward(input, weight, bias, _geometry(weight.shape[2:], layer))


def _backward_input(grad_output, weight, input_size, *layer):
    return launch.backward_input(grad_output, weight, input_size, _geometry(weight.shape[2:], layer))


def _backward_weight(grad_output, input, kernel_size, *layer):
    return launch.backward_weight(grad_output, input, _geometry(kernel_size, layer))


_KERNELS = {
    "conv_transpose": _conv_transpose,
    "backward_input": _backward_input,
    "backward_weight": _backward_weight,
    "backward_bias": launch.backward_bias,
}
for _name, _function in _KERNELS.items():
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _function, _key)


@cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of an ordinary tensor of a device, and of one made in inference mode; none where tconv has no kernels."""
    found = set()
    for inference in (False, True) if device in ("cpu", "cuda") else ():
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


_AUTOGRAD_KEY = torch._C.DispatchKey.AutogradFunctionality


def alone(args) -> bool:
    """Whether nothing but autograd stands between a call and the kernels: no mode, transform or trace that wants to see an
    operator, autograd where it is expected, and no tensor that torch's dispatcher would treat in a way of its own."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD_KEY)
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    keys = torch._C._dispatch_keys
    plain = _plain_keys(args[0].device.type)
    for t in args[:3]:
        if type(t) in PLAIN:
            if keys(t).raw_repr() not in plain:
                return False
        elif isinstance(t, torch.Tensor):
            return False
    return True


def _operator(name: str):
    """The operator as it is called here: past torch's dispatcher where only the kernels and autograd would answer, since to
    enter kernels written in Python takes the dispatcher as long as all the rest of a call."""
    operator, function = getattr(torch.ops.tconv, name), _KERNELS[name]

    def call(*args):
        if not alone(args):
            return operator(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _AUTOGRAD[name].apply(*args, None)
        return function(*args)

    return call


_AUTOGRAD: dict[str, type] = {}  # the Function of each operator
backward_input, backward_weight, backward_bias = map(_operator, ("backward_input", "backward_weight", "backward_bias"))


def conv_transpose(input, weight, bias, *layer) -> torch.Tensor:
    """The operator, past torch's dispatcher as above."""
    if not alone((input, weight, bias)):
        return torch.ops.tconv.conv_transpose(input, weight, bias, *layer)
    return forward(input, weight, bias, _geometry(weight.shape[2:], layer))


# Fakes: shapes and memory formats by the rules of the real ones, symbolic sizes included.


@register_fake("tconv::conv_transpose", lib=library)
def _(input, weight, bias, *layer):
    geometry = _geometry(weight.shape[2:], layer)
    return layouts.empty_output(input, weight, geometry.output_size(input.shape[2:]), weight.shape[1] * geometry.groups)


@register_fake("tconv::backward_input", lib=library)
def _(grad_output, weight, input_size, *layer):
    return layouts.empty_output(grad_output, weight, input_size, weight.shape[0])


@register_fake("tconv::backward_weight", lib=library)
def _(grad_output, input, kernel_size, stride, padding, output_padding, groups, dilation):
    return torch.empty(
        (input.shape[1], grad_output.shape[1] // groups, *kernel_size),
        dtype=input.dtype,
        device=input.device,
        memory_format=layouts.memory_format(input, grad_output),
    )


@register_fake("tconv::backward_bias", lib=library)
def _(grad_output):
    return grad_output.new_empty((grad_output.shape[1],))


# Autograd.  Every backward is made of the operators above, so it is differentiable again.


class _Function(torch.autograd.function._SingleLevelFunction):
    """A Function of one level of differentiation, which torch.compile's autograd can trace as well."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def forward(input, weight, bias, geometry: Geometry) -> torch.Tensor:
    """conv_transpose of tensors that are `alone`, of a layer whose arguments were checked."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(input, weight, bias):
        return tconv_conv_transpose.apply(input, weight, bias, geometry)  # type: ignore[attr-defined]
    return launch.forward(input, weight, bias, geometry)


class tconv_conv_transpose(_Function):
    """What autograd knows of `forward`, under the name that grad_fn shows; each further argument would take it time, forwards and
    backwards."""

    @staticmethod
    def forward(ctx, input, weight, bias, geometry):
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return launch.forward(input, weight, bias, geometry)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        geometry, needs = ctx.geometry, ctx.needs_input_grad
        if not torch.is_grad_enabled() and alone((grad, input, weight)):
            both = launch.gradients(grad, input, weight, geometry, needs)
            return *both, launch.backward_bias(grad) if needs[2] else None, None
        return *_gradients(grad, input, weight, needs, geometry.layer), None


def _gradients(grad, input, weight, needs, layer) -> tuple:
    return (
        backward_input(grad, weight, input.shape[2:], *layer) if needs[0] else None,
        backward_weight(grad, input, weight.shape[2:], *layer) if needs[1] else None,
        backward_bias(grad) if needs[2] else None,
    )


def _conv_transpose_setup(ctx, inputs, output):
    input, weight, _, *layer = inputs
    ctx.save_for_backward(input, weight)
    ctx.layer = layer


def _conv_transpose_backward(ctx, grad):
    input, weight = ctx.saved_tensors
    return *_gradients(grad, input, weight, ctx.needs_input_grad, ctx.layer), *(None,) * 5


def _backward_input_setup(ctx, inputs, output):
    grad_output, weight, _, *layer = inputs
    ctx.save_for_backward(grad_output, weight)
    ctx.layer = layer


def _backward_input_backward(ctx, grad):
    grad_output, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        conv_transpose(grad, weight, None, *ctx.layer) if needs[0] else None,
        backward_weight(grad_output, grad, weight.shape[2:], *ctx.layer) if needs[1] else None,
        *(None,) * 6,
    )


def _backward_weight_setup(ctx, inputs, output):
    grad_output, input, _, *layer = inputs
    ctx.save_for_backward(grad_output, input)
    ctx.layer = layer


def _backward_weight_backward(ctx, grad):
    grad_output, input = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        conv_transpose(input, grad, None, *ctx.layer) if needs[0] else None,
        backward_input(grad_output, grad, input.shape[2:], *ctx.layer) if needs[1] else None,
        *(None,) * 6,
    )


def _backward_bias_setup(ctx, inputs, output):
    ctx.shape = inputs[0].shape


def _backward_bias_backward(ctx, grad):
    return (grad.view(-1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape),)


# Forward-mode differentiation runs aten.  functional.py sees to that for a layer; an operator is reached only by a
# gradient that is itself differentiated forwards (jvp of vjp, say).


def _conv_transpose_aten(input, weight, bias, *layer):
    return aten.forward(input, weight, bias, _geometry(weight.shape[2:], layer))


def _backward_input_aten(grad_output, weight, input_size, *layer):
    like = grad_output.new_empty((grad_output.shape[0], weight.shape[0], *input_size))
    return aten.backward_input(grad_output, weight, like, _geometry(weight.shape[2:], layer))


def _backward_weight_aten(grad_output, input, kernel_size, *layer):
    geometry = _geometry(kernel_size, layer)
    like = input.new_empty((input.shape[1], grad_output.shape[1] // geometry.groups, *kernel_size))
    return aten.backward_weight(grad_output, input, like, geometry)


def _register_autograd(name: str, setup, backward, aten) -> None:
    """torch.library.register_autograd, made to work under torch.func's transforms too.

    Those differentiate level by level: this level's graph is recorded here, by a single-level function as for
    torch's own operators, and redispatching takes the call to the levels below, which record theirs.
    """
    op = getattr(torch.ops.tconv, name).default

    def forward(ctx, *args):
        *args, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:  # past the dispatcher
                output = _KERNELS[name](*args)
            elif torch._C._are_functorch_transforms_active():
                with torch.enable_grad():  # a Function's forward runs without, and so would the levels below
                    output = op.redispatch(keyset, *args)
            else:
                output = op.redispatch(keyset, *args)
        setup(ctx, args, output)
        return output

    def differentiate(ctx, grad):
        return *backward(ctx, grad), None

    members = dict(forward=staticmethod(forward), backward=staticmethod(differentiate))
    function = type(f"tconv_{name}", (_Function,), members)
    _AUTOGRAD[name] = function

    def kernel(keyset, *args):
        if forward_ad._current_level >= 0:
            return aten(*args)
        keyset = keyset & torch._C._after_autograd_keyset
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset, *args)
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*args, keyset)
        with enable_single_level_autograd_function():
            return function.apply(*args, keyset)

    library.impl(name, kernel, "Autograd", with_keyset=True)


_register_autograd("conv_transpose", _conv_transpose_setup, _conv_transpose_backward, _conv_transpose_aten)
_register_autograd("backward_input", _backward_input_setup, _backward_input_backward, _backward_input_aten)
_register_autograd("backward_weight", _backward_weight_setup, _backward_weight_backward, _backward_weight_aten)
_register_autograd("backward_bias", _backward_bias_setup, _backward_bias_backward, aten.backward_bias)


# Batching rules: the mapped dimension joins the batch where the weight is shared, and the groups
# where every sample has a weight (or a weight gradient) of its own.  One launch either way.


def _into(t: torch.Tensor, mapped: int | None, size: int, dim: int) -> torch.Tensor:
    """t with its mapped dimension (expanded where there is none) folded in front of dimension `dim`."""
    t = t.unsqueeze(dim).expand(*t.shape[:dim], size, *t.shape[dim:]) if mapped is None else t.movedim(mapped, dim)
    return t.flatten(dim, dim + 1)


def _out(t: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """t with the mapped dimension of `size` taken out of dimension `dim` again."""
    return t.unflatten(dim, (size, t.shape[dim] // size if size else 0))


def _grouped(layer, size):
    stride, padding, output_padding, groups, dilation = layer
    if size == 0:
        raise RuntimeError("conv_transpose: expected groups to be positive, got a mapped weight of batch size 0")
    return stride, padding, output_padding, groups * size, dilation


@register_vmap("tconv::conv_transpose", lib=library)
def _(info, in_dims, input, weight, bias, *layer):
    size = info.batch_size
    x_dim, w_dim, b_dim = in_dims[:3]
    late_bias = None
    if b_dim is not None:  # a bias a sample: added after, so that the weight need not be
        late_bias, bias = bias.movedim(b_dim, 0), None
    if w_dim is None and x_dim is None:
        y, dim = conv_transpose(input, weight, bias, *layer), None
    elif w_dim is None:
        y, dim = _out(conv_transpose(_into(input, x_dim, size, 0), weight, bias, *layer), size, 0), 0
    else:
        bias = None if bias is None else bias.repeat(size)
        y = conv_transpose(_into(input, x_dim, size, 1), _into(weight, w_dim, size, 0), bias, *_grouped(layer, size))
        y, dim = _out(y, size, 1), 1
    if late_bias is not None:
        y = y.movedim(dim, 0) if dim is not None else y
        y, dim = y + late_bias[(slice(None), None, slice(None)) + (None,) * len(layer[0])], 0
    return y, dim


@register_vmap("tconv::backward_input", lib=library)
def _(info, in_dims, grad_output, weight, input_size, *layer):
    size = info.batch_size
    g_dim, w_dim = in_dims[:2]
    if w_dim is None:
        return _out(backward_input(_into(grad_output, g_dim, size, 0), weight, input_size, *layer), size, 0), 0
    grad = backward_input(
        _into(grad_output, g_dim, size, 1), _into(weight, w_dim, size, 0), input_size, *_grouped(layer, size)
    )
    return _out(grad, size, 1), 1


@register_vmap("tconv::backward_weight", lib=library)
def _(info, in_dims, grad_output, input, kernel_size, *layer):
    size = info.batch_size
    grad = backward_weight(
        _into(grad_output, in_dims[0], size, 1),
        _into(input, in_dims[1], size, 1),
        kernel_size,
        *_grouped(layer, size),
    )
    return _out(grad, size, 0), 0


@register_vmap("tconv::backward_bias", lib=library)
def _(info, in_dims, grad_output):
    size = info.batch_size
    return _out(backward_bias(_into(grad_output, in_dims[0], size, 1)), size, 0), 0
