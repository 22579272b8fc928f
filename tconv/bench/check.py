"""When a result is right: the float64 oracle, and how far from it a result at a precision may be.

The tests and the benchmark judge by the same functions.  Errors are relative to the exact result's root mean square.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
import torch.nn.functional as F

ATEN = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
RESULTS = ("forward", "backward_input", "backward_weight", "backward_bias")

# TF32 results are also right when they are the exact products of operands rounded to nearest even, summed in fp32:
# cuDNN computes some layers in IEEE fp32 although TF32 is allowed, and its error is no yardstick there.  The bound is
# a third of TF32's own rounding error, for the tensor core's accumulation over long sums; operands truncated instead
# of rounded would be 8e-4 away.
TF32_SUM = 1e-4

# Above these root mean square errors no result is right, whatever torch makes: ten times and more of what a correct
# kernel with fp32 accumulation shows over the layers of the suites.
CEILING = {"tf32": 5e-3, "fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}
# A whole problem can enlarge errors beyond: of L3/45, whose batch norms spread softmaxes of 512, rounding the operands of its
# convolutions to TF32 and computing exactly makes 0.03 to 0.3.  As many times that is right then, up to a limit: zeros are off by 1.
ROUNDING, MOST = 4, 0.5


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of the tensors at "tf32", "fp32", "fp16" or "bf16"."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def set_precision(precision: str) -> None:
    """Set torch's flag for fp32 convolutions as "tf32" or "fp32" (IEEE) asks; it does not touch 16-bit ones."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def draw(shapes, kind: str, device) -> list[torch.Tensor | None]:
    """Normal float32 values for each shape (None stays None); kind "half": values that both 16-bit dtypes hold."""
    drawn: list[torch.Tensor | None] = []
    for shape in shapes:
        t = None if shape is None else torch.randn(shape, device=device)
        if t is not None and kind == "half":
            t = t.bfloat16().float()
            t = t.where(t.abs() > 1e-4, 0)
        drawn.append(t)
    return drawn


def round_tf32(t: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the nearest TF32 value, ties to even."""
    u = t.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    u = (u + 0xFFF + ((u >> 13) & 1)) & 0xFFFFE000
    u = torch.where(u >= 2**31, u - 2**32, u)
    return u.to(torch.int32).view(torch.float32)


def rounded(t: torch.Tensor, precision: str) -> torch.Tensor:
    """float64 values as a precision's products take them."""
    single = t.float()
    return (round_tf32(single) if precision == "tf32" else single.to(dtype_of(precision))).double()


def passes(function, input, weight, bias, grad_output, **layer):
    """(output, grad_input, grad_weight[, grad_bias]) of one layer."""
    leaves = [t.detach().requires_grad_(True) for t in (input, weight, bias) if t is not None]
    output = function(*leaves, *([None] if bias is None else []), **layer)
    return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))


def oracle(ndim, input, weight, bias, grad_output, tf32=False, **layer):
    """The same in float64; with tf32, on operands rounded as the tensor core sees them (biases never are)."""
    if not tf32:
        return passes(
            ATEN[ndim], *(None if t is None else t.double() for t in (input, weight, bias, grad_output)), **layer
        )
    input, weight, rounded_grad = (round_tf32(t).double() for t in (input, weight, grad_output))
    exact = passes(ATEN[ndim], input, weight, None if bias is None else bias.double(), rounded_grad, **layer)
    return exact if bias is None else (*exact[:3], grad_output.double().flatten(-ndim).sum(-1).sum_to_size(bias.shape))


def aten_pass(name: str, tensors, layer: dict) -> torch.Tensor:
    """One of RESULTS by aten, from (input, weight, bias, grad_output); `layer`: conv_transposeNd's keyword arguments."""
    input, weight, bias, grad_output = tensors
    if name == "backward_bias":
        return grad_output.flatten(2).sum((0, 2))
    where = layer["stride"], layer["padding"], layer["dilation"], True, layer["output_padding"], layer["groups"]
    if name == "forward":
        return torch.ops.aten.convolution(input, weight, bias, *where)
    mask = [name == "backward_input", name == "backward_weight", False]
    return torch.ops.aten.convolution_backward(grad_output, input, weight, None, *where, mask)[mask.index(True)]


def oracle_pass(name: str, tensors, layer: dict, tf32: bool = False) -> torch.Tensor:
    """One of RESULTS in float64, on TF32-rounded operands where asked (what is summed alone is never rounded)."""
    input, weight, bias, grad_output = tensors
    if tf32:
        input, weight = round_tf32(input), round_tf32(weight)
        grad_output = grad_output if name == "backward_bias" else round_tf32(grad_output)
    return aten_pass(name, [None if t is None else t.double() for t in (input, weight, bias, grad_output)], layer)


def errors(actual, exact):
    """(largest, root mean square) error, relative to the exact result's root mean square."""
    if actual.numel() == 0:
        return 0.0, 0.0
    difference = actual.double() - exact
    scale = exact.square().mean().sqrt().clamp_min(1e-30)
    return (difference.abs().max() / scale).item(), (difference.square().mean().sqrt() / scale).item()


def bounds(peer: tuple[float, float], eps: float) -> tuple[float, float]:
    """The (largest, rms) error allowed beside torch's own at the same precision.

    A quarter more in root mean square and a half more in the maximum, since the order of summation differs, and
    half a unit of the dtype (four in the maximum) where torch happens to be nearly exact.
    """
    return 1.5 * peer[0] + 4 * eps, 1.25 * peer[1] + 0.5 * eps


def terms(name: str, layer) -> int:
    """About how many products each element of one of RESULTS sums, of a bench.cases.Layer."""
    batch, _, *size = layer.input_shape
    taps = prod(layer.geometry.kernel)
    inner = {"forward": layer.in_channels, "backward_input": layer.out_channels}
    if name == "backward_bias":
        size = layer.output_shape[2:]
    return batch * prod(size) if name not in inner else inner[name] * taps // layer.geometry.groups


def judge(
    actual, exact, peer, precision: str, rounded=None, slack: float = 1.0, terms: int = 1
) -> tuple[tuple[float, float], str]:
    """A result's (largest, rms) error, and what is wrong with it: "" if nothing is.

    Args:
        exact: the float64 oracle's result.
        peer: torch's (largest, rms) error at the same precision, or None: then only CEILING bounds the error.
        rounded: called for the oracle's result on operands rounded to the precision, when a result misses the bounds.
        slack: multiplies the bounds that do not come from `peer`: operations behind the layer can enlarge its errors (above 1, also
            as `rounded` says).
        terms: how many products an element sums: one by one in fp32, their roundings add up like a random walk.
    """
    if actual.shape != exact.shape:
        return (float("inf"),) * 2, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = largest, rms = errors(actual, exact)
    rounded = rounded and cache(rounded)  # two bounds may ask
    ceiling = slack * max(CEILING[precision], 2**-24 * terms**0.5)
    if rms > ceiling and rounded is not None and slack > 1:
        ceiling = max(ceiling, min(MOST, ROUNDING * errors(rounded(), exact)[1]))
    if not rms <= ceiling:  # NaN too
        bad = int(actual.isnan().sum())
        return error, f"{bad} of {actual.numel()} elements are NaN" if bad else f"rms error {rms:.1e}"
    if peer is None:
        return error, ""
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype is torch.bfloat16 and actual.device.type == "cpu":
        eps *= 2  # Triton's interpreter truncates to bfloat16 where a GPU rounds
    most, most_rms = bounds(peer, eps)
    if largest <= most and rms <= most_rms:
        return error, ""
    if precision == "tf32" and rounded is not None and errors(actual, rounded())[1] <= slack * TF32_SUM:
        return error, ""
    return error, f"error {largest:.1e} (allowed {most:.1e}), rms {rms:.1e} (allowed {most_rms:.1e})"
