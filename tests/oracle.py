"""The float64 oracle (tconv/bench/check.py) and the assertion by which a small case is judged against it."""

import torch

from tconv.bench.check import ATEN, errors, oracle, passes, round_tf32

__all__ = ["ATEN", "assert_no_worse", "errors", "oracle", "passes", "round_tf32"]


def assert_no_worse(actual, exact, peer, what=""):
    """tconv's error is bounded by what torch makes at the same dtype, both against the oracle.

    A quarter more is allowed in root mean square and a half more in the maximum (the order of summation
    differs), and half a unit of the dtype where torch happens to be nearly exact.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    eps = torch.finfo(actual.dtype).eps
    slack = 1.0
    if actual.device.type == "cpu":  # Triton's interpreter
        slack = 2.0  # it has no fused multiply-add, and torch's peer there is oneDNN with its own order of summation
        eps *= 2 if actual.dtype is torch.bfloat16 else 1  # it truncates to bfloat16 where a GPU rounds
    (largest, rms), (peer_largest, peer_rms) = errors(actual, exact), errors(peer, exact)
    scale = exact.abs().max() / exact.square().mean().sqrt().clamp_min(1e-30) if exact.numel() else 1.0
    assert rms <= 1.25 * slack * peer_rms + 0.5 * eps, f"{what}: rms error {rms:.2e}, torch {peer_rms:.2e}"
    if actual.numel() < 1000:
        return  # the largest error of so few is chance
    assert largest <= 1.5 * slack * peer_largest + 0.5 * eps * float(scale), (
        f"{what}: max error {largest:.2e}, torch {peer_largest:.2e}"
    )
