"""Every layer of KernelBench and the zoo at full size, at every precision, in both memory formats, all passes.

On a GPU alone.  The oracle is fp64; the yardstick is cuDNN at the same precision, in the same run.
"""

import functools

import pytest
import torch
from oracle import ATEN, errors, oracle, passes

import tconv
from tconv.bench.check import draw, dtype_of, judge, set_precision
from tconv.workloads import SUITES, layers

TCONV = {1: tconv.conv_transpose1d, 2: tconv.conv_transpose2d, 3: tconv.conv_transpose3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
PASSES = ("forward", "backward_input", "backward_weight", "backward_bias")
# Bytes an element of input and output: float64 operands and results, or float32 ones, a result in both formats and the
# temporaries of the comparison; and what cuDNN may take besides.
BYTES, WORKSPACE = 64, 2 * 10**9

ALL = sorted((layer for suite in SUITES for layer in layers(suite)), key=lambda layer: -layer.elements)


def rounded_oracle(i, ndim, tensors, options):
    return oracle(ndim, *tensors, tf32=True, **options)[i]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ALL, ids=lambda layer: layer.name)
def test_layer(layer, reserve):
    reserve(BYTES * layer.elements + WORKSPACE)
    torch.use_deterministic_algorithms(False)  # cuDNN at its best; outputs are poisoned below
    ndim = layer.geometry.ndim
    failures = []
    for kind in ("fp32", "half"):
        # One draw for both 16-bit dtypes: bfloat16 values that float16 holds too.
        shapes = (
            layer.input_shape,
            layer.weight_shape,
            (layer.out_channels,) if layer.bias else None,
            layer.output_shape,
        )
        x, w, bias, grad = draw(shapes, kind, "cuda")
        exact = passes(ATEN[ndim], *(None if t is None else t.double() for t in (x, w, bias, grad)), **layer.options)
        for precision in ("tf32", "fp32") if kind == "fp32" else ("fp16", "bf16"):
            set_precision(precision)
            tensors = [None if t is None else t.to(dtype_of(precision)) for t in (x, w, bias, grad)]
            peer = [errors(p, e) for p, e in zip(passes(ATEN[ndim], *tensors, **layer.options), exact)]
            for channels_last in (False, True) if ndim > 1 else (False,):
                if channels_last:
                    tensors = [
                        t.contiguous(memory_format=LAST[t.ndim]) if t is not None and t.ndim > 1 else t for t in tensors
                    ]
                poison = torch.full_like(tensors[3], float("nan"))
                del poison  # its memory is what the output is allocated from next
                actual = passes(TCONV[ndim], *tensors, **layer.options)
                for i, (name, a, e, p) in enumerate(zip(PASSES, actual, exact, peer)):
                    rounded = functools.partial(rounded_oracle, i, ndim, (x, w, bias, grad), layer.options)
                    _, wrong = judge(a, e, p, precision, rounded)
                    if wrong:
                        failures.append(f"{name} {precision} {'channels_last' if channels_last else 'nchw'}: {wrong}")
                del actual
        del exact
    assert not failures, f"{layer}\n" + "\n".join(failures)
