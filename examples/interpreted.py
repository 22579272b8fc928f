"""The demo's generator on tconv's kernels without a GPU: Triton's interpreter carries each kernel out in NumPy.

A program of its own, since TRITON_INTERPRET must be set before Triton is imported; demo.py starts it as

    TRITON_INTERPRET=1 python interpreted.py model.pt result.pt

and reads one line from it for every transposed convolution that has run.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from unet import UNet

import tconv


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, relative to the largest exact value."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def run_generator(config: dict, state: dict, noise: torch.Tensor) -> tuple[torch.Tensor, list]:
    """The generator's picture, and (name, kernel, reason, error against float64) of each transposed convolution."""
    model = UNet(**config)
    model.load_state_dict(state)
    tconv.convert(model)
    names = {module: name for name, module in model.named_modules()}
    layers = []

    def record(layer, inputs, output):
        call = (inputs[0], layer.weight, layer.bias)
        exact = F.conv_transpose2d(*(t.double() for t in call), layer.stride, layer.padding)
        plan = tconv.explain(*call, layer.stride, layer.padding).passes[0].plan
        if plan.family == "aten":
            sys.exit(f"{names[layer]} did not run on a kernel: {plan.reason}")
        layers.append((names[layer], plan.family, plan.reason, relative_error(output, exact)))
        print(names[layer], flush=True)

    for module in names:
        if isinstance(module, nn.ConvTranspose2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        return model(noise), layers


def run_cut_down() -> tuple[str, list]:
    """One small layer, forward and backward: what explain() says, and (result, error against float64) of each pass."""
    torch.manual_seed(0)
    call = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 4, 4), torch.randn(8)
    grad_output = torch.randn(1, 8, 12, 12)

    def passes(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in call]
        output = function(*leaves, stride=2, padding=1)
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))

    pairs = zip(
        ("output", "grad_input", "grad_weight", "grad_bias"),
        passes(tconv.conv_transpose2d, torch.float32),
        passes(F.conv_transpose2d, torch.float64),
        strict=True,
    )
    errors = [(name, relative_error(actual, exact)) for name, actual, exact in pairs]
    return str(tconv.explain(*call, stride=2, padding=1)), errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    explanation, passes = run_cut_down()
    image, layers = run_generator(**torch.load(sys.argv[1]))
    torch.save({"image": image, "layers": layers, "explanation": explanation, "passes": passes}, sys.argv[2])
