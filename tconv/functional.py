"""torch.nn.functional's transposed convolutions, on tconv's kernels."""

from __future__ import annotations

import torch

from . import ops
from .dispatch import refuse
from .geometry import Geometry, check, check_cached, make_geometry

# Called with (input, weight, bias, stride, ...) of every call; explain() listens here.
observers: list = []

ATEN = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}

_DOC = """Transposed convolution over {axes}, as torch.nn.functional.conv_transpose{n}d.

    Args:
        input: (N, in_channels, {spatial}) or, unbatched, (in_channels, {spatial}); float16, bfloat16 or
            float32 on a GPU. Any strides; contiguous and channels_last are mostly read as they come.
        weight: (in_channels, out_channels / groups, {kernel}), of input's dtype and device.
        bias: (out_channels,), or None (the default).
        stride: step between the outputs of neighbouring inputs; int or {n} ints, at least 1. Default 1.
        padding: dilation * (kernel - 1) - padding zeros surround the input; int or {n} ints. Default 0.
        output_padding: size added to one side of the output; less than stride or dilation. Default 0.
        groups: channel groups; divides in_channels. Default 1.
        dilation: spacing of the kernel's taps; int or {n} ints, at least 1. Default 1.

    Returns:
        (N, out_channels, {out}), each axis (i - 1) * stride - 2 * padding + dilation * (kernel - 1)
        + output_padding + 1 long (Dumoulin and Visin, "A guide to convolution arithmetic for deep learning",
        relation 14); channels_last where input or weight is.

    float32 follows torch.backends.cudnn.allow_tf32 and the fp32_precision settings as they stand at the call.
    CPU tensors, float64, complex and quantized ones run aten (`tconv.explain` gives the reason).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit together.
        TypeError: an argument that is not a tensor, or not made of ints, where one is wanted.
    """


def as_int(value, name: str, ndim: int, wanted: str) -> int:
    """An int, or whatever stands for one (NumPy's ints, a tensor of one int), but not a bool; else TypeError."""
    if type(value) is int or isinstance(value, torch.SymInt):  # a symbol must not become a constant
        return value  # type: ignore[return-value]
    try:
        if not isinstance(value, bool):
            return value.__index__()
    except (AttributeError, TypeError):
        pass
    raise TypeError(
        f"conv_transpose{ndim}d(): argument '{name}' must be {wanted}, got {value!r} of type {type(value).__name__}"
    )


def as_tuple(value, name: str, ndim: int) -> tuple[int, ...]:
    """An int or a sequence of ints as a tuple of `ndim` ints, as torch broadcasts them.

    Raises TypeError for anything that is not made of ints and RuntimeError for a wrong length.
    """
    if type(value) is tuple and len(value) == ndim and all(type(v) is int for v in value):
        return value  # as modules have them: the rest takes as long as a kernel's launch
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = tuple(as_int(v, name, ndim, f"an int or a tuple of {ndim} ints") for v in values)
    if len(values) == 1:
        values = values * ndim
    if len(values) != ndim:
        raise RuntimeError(
            f"conv_transpose{ndim}d(): expected {name} to be a single int or {ndim} ints, got {name}={list(values)}"
        )
    return values


def autocast(device_type: str, *tensors):
    """Tensors as autocast, where it is on, would hand them to aten's convolution."""
    # Other devices run aten, which knows of their autocast; "meta" has none and torch refuses to be asked.
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if isinstance(t, torch.Tensor)
        and t.is_floating_point()
        and t.dtype is not torch.float64
        and t.dtype is not dtype
        else t
        for t in tensors
    )


def _check_tensors(ndim: int, input, weight, bias) -> None:
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != input.device:
            raise RuntimeError(
                f"conv_transpose{ndim}d(): expected all tensors to be on the same device, "
                f"got input on {input.device} and {name} on {t.device}"
            )
        if t.dtype is not input.dtype:
            raise RuntimeError(
                f"conv_transpose{ndim}d(): expected {name} to have input's dtype {input.dtype}, got {t.dtype}"
            )


MOST_PASSED = 4096  # then all are forgotten, so that ever new sizes do not fill the memory
_passed: dict[tuple, Geometry] = {}


def _are_ints(values) -> bool:
    """Whether each is an int or a tuple of ints, which 1.0 and True, though equal to one, are not."""
    for value in values:
        for each in value if type(value) is tuple else (value,):
            if type(each) is not int:
                return False
    return True


def _key(ndim, input, weight, bias, *layer) -> tuple:
    """What identifies a call for the checks, of tensors that are `ops.alone` and of ints."""
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.device)
    return ndim, input.shape, input.dtype, input.device, weight.shape, weight.dtype, weight.device, of_bias, layer


def conv_transpose(ndim, input, weight, bias, stride, padding, output_padding, groups, dilation):
    """The function behind conv_transpose1d, 2d and 3d; `ndim` counts spatial axes."""
    for observe in observers:
        observe((input, weight, bias, stride, padding, output_padding, groups, dilation))
    original = input, weight, bias
    if isinstance(input, torch.Tensor):
        input, weight, bias = autocast(input.device.type, input, weight, bias)
    key = ()
    # A call like an earlier one is checked by its key: one by one the checks take as long as a kernel's launch.
    given = (input, weight) if bias is None else (input, weight, bias)
    layer = stride, padding, output_padding, groups, dilation
    if _are_ints(layer) and all([isinstance(t, torch.Tensor) for t in given]) and ops.alone(given):
        key = _key(ndim, input, weight, bias, *layer)
        if (geometry := _passed.get(key)) is not None:
            return ops.forward(input, weight, bias, geometry)
    if refuse(input, weight, bias) is not None:
        return ATEN[ndim](*original, stride, padding, output_padding, groups, dilation)
    _check_tensors(ndim, input, weight, bias)
    if input.ndim not in (ndim + 1, ndim + 2):
        raise RuntimeError(
            f"Expected {ndim + 1}D (unbatched) or {ndim + 2}D (batched) input to conv_transpose{ndim}d, "
            f"but got input of size: {list(input.shape)}"
        )
    stride = as_tuple(stride, "stride", ndim)
    padding = as_tuple(padding, "padding", ndim)
    output_padding = as_tuple(output_padding, "output_padding", ndim)
    dilation = as_tuple(dilation, "dilation", ndim)
    groups = as_int(groups, "groups", ndim, "an int")
    unbatched = input.ndim == ndim + 1
    if unbatched:
        input = input.unsqueeze(0)
    bias_shape = None if bias is None else bias.shape
    facts = (ndim, input.shape, weight.shape, bias_shape, stride, padding, output_padding, groups, dilation)
    if torch.compiler.is_compiling():
        check(*facts)
    else:
        try:
            check_cached(*facts)
        except TypeError:  # symbolic sizes (make_fx) have no hash
            check(*facts)
    if key and not unbatched:
        if len(_passed) >= MOST_PASSED:
            _passed.clear()
        _passed[key] = make_geometry(tuple(weight.shape[2:]), stride, padding, output_padding, groups, dilation)
    output = ops.conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return output.squeeze(0) if unbatched else output


def conv_transpose1d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    return conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    return conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    return conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation)


conv_transpose1d.__doc__ = _DOC.format(n=1, axes="a signal", spatial="L", kernel="kL", out="L_out")
conv_transpose2d.__doc__ = _DOC.format(n=2, axes="an image", spatial="H, W", kernel="kH, kW", out="H_out, W_out")
conv_transpose3d.__doc__ = _DOC.format(
    n=3, axes="a volume", spatial="D, H, W", kernel="kD, kH, kW", out="D_out, H_out, W_out"
)
