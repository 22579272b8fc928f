"""aten's own transposed convolution and its gradients: what dispatch leaves to it, in one place.

cuDNN is kept to its deterministic algorithms, whatever torch's flag says; which of them runs is chosen as torch's other
flags have it, by measuring under torch.backends.cudnn.benchmark.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .geometry import Geometry

_lock = threading.Lock()
_inside, _before = 0, False  # threads inside, and what the flag was when the first came


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's flag is the process's: a convolution of torch's own in another thread sees it set meanwhile."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.backends.cudnn.deterministic
            torch._C._set_cudnn_deterministic(True)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch._C._set_cudnn_deterministic(_before)


def backward_bias(grad_output) -> torch.Tensor:
    """aten's grad_bias."""
    return grad_output.sum((0, *range(2, grad_output.ndim)))


def forward(input, weight, bias, geometry: Geometry) -> torch.Tensor:
    """aten's forward pass."""
    with _deterministic():
        return torch.ops.aten.convolution(input, weight, bias, *_layer(geometry))


# aten's formula wants all operands of the layer: of the one that a gradient does not depend on, it reads size and
# memory format.  That is `like`, an uninitialised tensor such as the result.


def backward_input(grad_output, weight, like, geometry: Geometry) -> torch.Tensor:
    """aten's grad_input."""
    with _deterministic():
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(grad_output, like, weight, None, *_layer(geometry), mask)[0]


def backward_weight(grad_output, input, like, geometry: Geometry) -> torch.Tensor:
    """aten's grad_weight."""
    with _deterministic():
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(grad_output, input, like, None, *_layer(geometry), mask)[1]


def _layer(g: Geometry) -> tuple:
    return g.stride, g.padding, g.dilation, True, g.output_padding, g.groups
