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
def deterministic() -> Iterator[None]:
    """cuDNN's deterministic algorithms alone.  torch's flag is the process's: a convolution of torch's own in another thread sees
    it set meanwhile."""
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
    with deterministic():
        return torch.ops.aten.convolution(input, weight, bias, *_layer(geometry))


# aten's formula wants all operands of the layer: of the one that a gradient does not depend on, it reads size and
# memory format.  That is `like`, an uninitialised tensor such as the result.


def backward_input(grad_output, weight, like, geometry: Geometry) -> torch.Tensor:
    """aten's grad_input."""
    return _gradients((True, False), grad_output, like, weight, geometry)[0]


def backward_weight(grad_output, input, like, geometry: Geometry, parts: int = 1) -> torch.Tensor:
    """aten's grad_weight, the sum of those of so many parts of the batch."""
    if parts == 1:
        return _gradients((False, True), grad_output, input, like, geometry)[1]
    batches = zip(grad_output.tensor_split(parts), input.tensor_split(parts))
    total = backward_weight(*next(batches), like, geometry)
    for part in batches:
        total += backward_weight(*part, like, geometry)
    return total


def gradients(grad_output, input, weight, geometry: Geometry) -> list[torch.Tensor]:
    """aten's grad_input and grad_weight, from one call."""
    return _gradients((True, True), grad_output, input, weight, geometry)


def _gradients(which: tuple[bool, bool], grad_output, input, weight, geometry: Geometry) -> list[torch.Tensor]:
    """The gradients of input and weight, those of them that are asked for.  Activations of a 1-d layer may have a height of 1
    before their width."""
    layer = _layer(geometry)
    if lifted := geometry.ndim == 1 and grad_output.ndim == 4:
        stride, padding, dilation, transposed, output_padding, groups = layer
        layer = (1, *stride), (0, *padding), (1, *dilation), transposed, (0, *output_padding), groups
        input, weight = (t.unsqueeze(2) if t.ndim == 3 else t for t in (input, weight))
    with deterministic():
        found = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *layer, [*which, False])[:2]
    return [t.squeeze(2) if lifted and t is not None else t for t in found]


def _layer(g: Geometry) -> tuple:
    return g.stride, g.padding, g.dilation, True, g.output_padding, g.groups
