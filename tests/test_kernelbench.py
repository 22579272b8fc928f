"""KernelBench: the face it asks for, its tolerance on its own level 1 inputs, and the time of a first call."""

import os
import subprocess
import sys

import pytest
import torch

from tconv import kernelbench
from tconv.workloads import layers

LEVEL1 = [layer for layer in layers("kernelbench") if layer.name.startswith("L1/")]
MODELS = {1: kernelbench.ModelNew1d, 2: kernelbench.ModelNew, 3: kernelbench.ModelNew3d}


def model(layer):
    return MODELS[layer.geometry.ndim](
        layer.in_channels, layer.out_channels, layer.geometry.kernel, bias=layer.bias, **layer.options
    )


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LEVEL1, ids=lambda layer: layer.name)
def test_level1_agrees_within_1e_4_under_default_flags(layer, reserve):
    """KernelBench's own check: uniform inputs, torch.allclose at 1e-4 against the module it replaces."""
    reserve(32 * layer.elements)
    assert torch.backends.cudnn.allow_tf32
    ours = model(layer).cuda()
    theirs = getattr(torch.nn, type(ours.conv_transpose).__name__)(
        layer.in_channels, layer.out_channels, layer.geometry.kernel, bias=layer.bias, **layer.options
    ).cuda()
    theirs.load_state_dict(ours.conv_transpose.state_dict())
    x = torch.rand(layer.input_shape, device="cuda")
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


FIRST_CALL = """
import time, torch
from tconv.workloads import layers
from test_kernelbench import model
layer = next(l for l in layers("kernelbench") if l.name == {name!r})
x = torch.rand(layer.input_shape, device="cuda")
ours = model(layer).cuda()
torch.cuda.synchronize()
start = time.perf_counter()
with torch.no_grad():
    ours(x)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("name", ("L1/57", "L1/58", "L1/64", "L1/71", "L1/72", "L1/75"))
def test_first_call_takes_under_5_seconds(name, tmp_path):
    """In a process of its own, with an empty Triton cache: import of Triton, compilation and launch."""
    here = os.path.dirname(__file__)
    code = FIRST_CALL.format(name=name)
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 5


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_every_argument_works(ndim, device):
    """The predecessor took stride 1 and no output_padding; here ints and tuples of everything do."""
    function = getattr(kernelbench, f"triton_conv_transpose{ndim}d")
    aten = getattr(torch, f"conv_transpose{ndim}d")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    x = torch.randn(2, 4, *(3, 4, 5)[:ndim], device=device)
    w, bias = torch.randn(4, 3, *(2, 3, 4)[:ndim], device=device), torch.randn(6, device=device)
    for stride, padding, output_padding in (
        (1, 0, 0),
        (2, 1, 1),
        ((3, 2, 4)[:ndim], (0, 1, 2)[:ndim], (2, 1, 0)[:ndim]),
    ):
        args = (x, w, bias, stride, padding, output_padding, 2)
        torch.testing.assert_close(function(*args), aten(*args), atol=1e-5, rtol=1e-5)
    layer = MODELS[ndim](4, 6, (2, 3, 4)[:ndim], stride=2, padding=1, output_padding=1, groups=2, bias=True).to(device)
    c = layer.conv_transpose
    expected = aten(x, c.weight, c.bias, c.stride, c.padding, c.output_padding, c.groups)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
