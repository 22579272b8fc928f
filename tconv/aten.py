"""aten's own transposed convolution and its gradients: what dispatch leaves to it, in one place."""

from __future__ import annotations

import torch

from .geometry import Geometry


def backward_bias(grad_output) -> torch.Tensor:
    """aten's grad_bias."""
    return grad_output.sum((0, *range(2, grad_output.ndim)))


def forward(input, weight, bias, geometry: Geometry) -> torch.Tensor:
    """aten's forward pass."""
    return torch.ops.aten.convolution(
        input,
        weight,
        bias,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        True,
        geometry.output_padding,
        geometry.groups,
    )


def backward(grad_output, input, weight, geometry: Geometry, index: int) -> torch.Tensor:
    """aten's gradient of the input (index 0) or the weight (1); the other operand gives its shape alone."""
    return torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        True,
        geometry.output_padding,
        geometry.groups,
        [index == 0, index == 1, False],
    )[index]
