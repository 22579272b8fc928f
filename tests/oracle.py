"""The float64 oracle and the rule by which a result is judged against it."""

import torch
import torch.nn.functional as F

ATEN = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def round_tf32(t: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the nearest TF32 value, ties to even."""
    u = t.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    u = (u + 0xFFF + ((u >> 13) & 1)) & 0xFFFFE000
    u = torch.where(u >= 2**31, u - 2**32, u)
    return u.to(torch.int32).view(torch.float32)


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
    return exact if bias is None else (*exact[:3], grad_output.double().flatten(2).sum((0, 2)))


def errors(actual, exact):
    """(largest, root mean square) error, relative to the exact result's root mean square."""
    if actual.numel() == 0:
        return 0.0, 0.0
    difference = actual.double() - exact
    scale = exact.square().mean().sqrt().clamp_min(1e-30)
    return (difference.abs().max() / scale).item(), (difference.square().mean().sqrt() / scale).item()


def assert_no_worse(actual, exact, peer, what=""):
    """tconv's error is bounded by what torch makes at the same dtype, both against the oracle.

    A quarter more is allowed in root mean square and a half more in the maximum (the order of summation
    differs), and half a unit of the dtype where torch happens to be nearly exact.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    eps = torch.finfo(actual.dtype).eps
    if actual.dtype is torch.bfloat16 and actual.device.type == "cpu":
        eps *= 2  # Triton's interpreter truncates to bfloat16 where a GPU rounds
    (largest, rms), (peer_largest, peer_rms) = errors(actual, exact), errors(peer, exact)
    scale = exact.abs().max() / exact.square().mean().sqrt().clamp_min(1e-30) if exact.numel() else 1.0
    assert rms <= 1.25 * peer_rms + 0.5 * eps, f"{what}: rms error {rms:.2e}, torch {peer_rms:.2e}"
    assert largest <= 1.5 * peer_largest + 0.5 * eps * float(scale), (
        f"{what}: max error {largest:.2e}, torch {peer_largest:.2e}"
    )
