"""torch's own samples for its transposed convolutions (OpInfo and ModuleInfo), run on tconv."""

import copy
from math import log2, prod

import pytest
import torch
from oracle import ATEN, assert_no_worse, errors, oracle, passes
from samples import OURS, TCONV
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import tconv

OPS = {int(op.name[-2]): op for op in op_db if op.name in {f"nn.functional.conv_transpose{n}d" for n in (1, 2, 3)}}
MODULES = {m.name.removeprefix("nn."): m for m in module_db if "ConvTranspose" in m.name}
# Samples that visit more (output pixel, tap) pairs than this run on a GPU alone: two of conv_transpose3d's, with a
# kernel of 4x5x6 dilated by 4, which would keep the interpreter busy for a minute a dtype.
INTERPRETER_VISITS = 200_000
# How many samples torch 2.11 to 2.13 have at least that pass the rule above; a module has 2.
LEAST_SAMPLES = 8

ndims = pytest.mark.parametrize("ndim", sorted(OPS), ids="conv_transpose{}d".format)
# float64 runs on the kernels in the interpreter alone; there it is the dtype that shows most.
dtypes = pytest.mark.parametrize(
    "dtype",
    (torch.float32, torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float64, torch.float32),
    ids=str,
)


def samples(ndim, device, dtype):
    """torch's samples of an operator as (input, weight, bias, hyper-parameters), each plainly laid out and not."""
    count = 0
    for sample in OPS[ndim].sample_inputs(device, dtype):
        weight = sample.args[0]
        output = ATEN[ndim](sample.input, *sample.args, **sample.kwargs)
        visits = output.numel() // output.shape[-ndim - 1] * prod(weight.shape[2:])
        if device == "cpu" and visits > INTERPRETER_VISITS:
            continue
        count += 1
        # The interpreter takes its time: there float64 alone sees both, and not of volumes.
        both = (dtype is torch.float64 and ndim < 3) or device != "cpu"
        for each in (sample, sample.noncontiguous()) if both else (sample,):
            yield each.input, *each.args, each.kwargs
    assert count >= LEAST_SAMPLES


class Judge:
    """Compares samples: float64 at once and to its own precision, other dtypes together and by the oracle's rule.

    Together, since the largest error of a few dozen elements is chance; each sample counts with its results scaled
    (by a power of two, which rounds nothing) to about 1.
    """

    def __init__(self):
        self.results = {}

    def add(self, title, names, actual, exact, peer):
        for name, a, e, p in zip(names, actual, exact, peer, strict=True):
            assert a.dtype == p.dtype and a.shape == e.shape, f"{title} {name}: {a.dtype} {a.shape}, expected {e.shape}"
            largest, rms = errors(a, e)
            limit = 1e-14 if a.dtype is torch.float64 else 20 * torch.finfo(a.dtype).eps
            assert rms < limit, f"{title} {name}: rms error {rms:.2e}, max {largest:.2e}"
            scale = 2.0 ** -round(log2(e.square().mean().sqrt()))
            self.results.setdefault(name, []).append([t.flatten() * scale for t in (a, e, p)])

    def decide(self):
        for name, results in self.results.items():
            actual, exact, peer = (torch.cat(each) for each in zip(*results, strict=True))
            if actual.dtype is not torch.float64:
                assert_no_worse(actual, exact, peer, name)


@dtypes
@ndims
def test_operator(ndim, dtype, device, ieee):
    judge = Judge()
    for input, weight, bias, layer in samples(ndim, device, dtype):
        plans = tconv.explain(input, weight, bias, **layer).passes
        assert {p.plan.family for p in plans} <= {"few", "gemm", "direct"}
        grad_output = torch.randn_like(ATEN[ndim](input, weight, bias, **layer))
        tensors = input, weight, bias, grad_output
        names = "output", "grad_input", "grad_weight", "grad_bias"
        judge.add(
            f"{list(input.shape)}, {list(weight.shape)}, {layer}",
            names[: 3 + (bias is not None)],
            passes(TCONV[ndim], *tensors, **layer),
            oracle(ndim, *tensors, **layer),
            passes(ATEN[ndim], *tensors, **layer),
        )
    judge.decide()


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128, torch.int64), ids=str)
@ndims
def test_operator_of_dtypes_left_to_aten(ndim, dtype, device):
    if dtype not in OPS[ndim].supported_dtypes(device):
        pytest.skip(f"torch has no {dtype} transposed convolution on {device}")
    for input, weight, bias, layer in samples(ndim, device, dtype):
        actual, expected = (f(input, weight, bias, **layer) for f in (TCONV[ndim], ATEN[ndim]))
        assert actual.dtype is dtype and torch.equal(actual, expected)


def run(module, input, grad_output):
    """Output and the gradients of input and parameters."""
    input = input.detach().requires_grad_(True)
    output = module(input)
    leaves = (input, *module.parameters())
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output.expand_as(output))


@dtypes
@pytest.mark.parametrize("name", sorted(MODULES))
def test_module(name, dtype, device, ieee):
    info, ours = MODULES[name], OURS[int(name[-2])]
    lazy = name.startswith("Lazy")
    if lazy and dtype is torch.float64:
        pytest.skip("the interpreter is slow, and once they have seen an input, lazy modules are the others")
    inputs = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=True)
    assert len(inputs) >= 2
    judge = Judge()
    for sample in inputs:
        arguments = sample.constructor_input
        (input,) = sample.forward_input.args
        torchs = info.module_cls(*arguments.args, **arguments.kwargs).to(device, dtype)
        if lazy:  # tconv has no lazy modules of its own: torch's become tconv's
            module = copy.deepcopy(torchs)
            tconv.convert(module)
            module(input), torchs(input)
        else:
            module = ours(*arguments.args, **arguments.kwargs).to(device, dtype)
        module.load_state_dict(torchs.state_dict())
        assert type(module) is ours and repr(module) == repr(torchs)
        grad_output = torch.randn_like(torchs(input))
        exact = run(copy.deepcopy(torchs).double(), input.double(), grad_output.double())
        names = "output", "input", *(n for n, _ in module.named_parameters())
        judge.add(sample.desc, names, run(module, input, grad_output), exact, run(torchs, input, grad_output))
    judge.decide()
