"""Every layer of KernelBench and the zoo at full size, at every precision, in both memory formats, all passes.

On a GPU alone.  The oracle is fp64; the yardstick is cuDNN at the same precision, in the same run.
"""

import pytest
import torch
from oracle import ATEN, errors, oracle, passes

import tconv
from tconv.workloads import SUITES, layers

TCONV = {1: tconv.conv_transpose1d, 2: tconv.conv_transpose2d, 3: tconv.conv_transpose3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
PASSES = ("forward", "backward_input", "backward_weight", "backward_bias")
BIG = 10**8  # elements; such layers run two at a time, for the GPU's memory

# TF32 results are also right when they are the exact products of operands rounded to nearest even, summed in fp32:
# cuDNN computes some layers in IEEE fp32 although TF32 is allowed, and its error is no yardstick there.
TF32_SUM = 4e-6

ALL = [
    pytest.param(layer, id=layer.name, marks=[pytest.mark.xdist_group(f"big{i % 2}")] if layer.elements > BIG else [])
    for suite in SUITES
    for i, layer in enumerate(sorted(layers(suite), key=lambda layer: -layer.elements))
]


def bounds(peer, eps):
    return 1.5 * peer[0] + 4 * eps, 1.25 * peer[1] + 0.5 * eps


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ALL)
def test_layer(layer):
    torch.use_deterministic_algorithms(False)  # cuDNN at its best; outputs are poisoned below
    ndim = layer.geometry.ndim
    failures = []
    for kind in ("fp32", "half"):
        # One draw for both 16-bit dtypes: bfloat16 values that float16 holds too.
        draw = torch.float32 if kind == "fp32" else torch.bfloat16
        x, w, grad = (
            torch.randn(s, device="cuda").to(draw).float()
            for s in (layer.input_shape, layer.weight_shape, layer.output_shape)
        )
        bias = torch.randn(layer.out_channels, device="cuda").to(draw).float() if layer.bias else None
        if kind == "half":
            x, w, grad = (t.where(t.abs() > 1e-4, 0) for t in (x, w, grad))
        exact = passes(ATEN[ndim], *(None if t is None else t.double() for t in (x, w, bias, grad)), **layer.options)
        for precision in ("tf32", "ieee") if kind == "fp32" else ("float16", "bfloat16"):
            torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            dtype = torch.float32 if kind == "fp32" else getattr(torch, precision)
            eps = torch.finfo(dtype).eps
            tensors = [None if t is None else t.to(dtype) for t in (x, w, bias, grad)]
            peer = [errors(p, e) for p, e in zip(passes(ATEN[ndim], *tensors, **layer.options), exact)]
            for channels_last in (False, True) if ndim > 1 else (False,):
                if channels_last:
                    tensors = [
                        t.contiguous(memory_format=LAST[t.ndim]) if t is not None and t.ndim > 1 else t for t in tensors
                    ]
                poison = torch.full_like(tensors[3], float("nan"))
                del poison  # its memory is what the output is allocated from next
                actual = passes(TCONV[ndim], *tensors, **layer.options)
                for name, a, e, p in zip(PASSES, actual, exact, peer):
                    largest, rms = errors(a, e)
                    most = bounds(p, eps)
                    if largest <= most[0] and rms <= most[1]:
                        continue
                    if precision == "tf32":
                        rounded = oracle(ndim, x, w, bias, grad, tf32=True, **layer.options)[PASSES.index(name)]
                        rms = errors(a, rounded)[1]
                    if precision != "tf32" or rms > TF32_SUM:
                        failures.append(
                            f"{name} {precision} {'channels_last' if channels_last else 'nchw'}: max {largest:.2e} "
                            f"(allowed {most[0]:.2e}), rms {rms:.2e} (allowed {most[1]:.2e})"
                        )
                del actual
        del exact
    assert not failures, f"{layer}\n" + "\n".join(failures)
