"""Tiny layers, one of each kind of geometry and kernel, for the tests that are not about numbers."""

from dataclasses import dataclass, field

import pytest
import torch
from oracle import ATEN

import tconv

TCONV = {1: tconv.conv_transpose1d, 2: tconv.conv_transpose2d, 3: tconv.conv_transpose3d}
OURS = {1: tconv.ConvTranspose1d, 2: tconv.ConvTranspose2d, 3: tconv.ConvTranspose3d}
TORCHS = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
NAMES = ("input", "weight", "bias")


@dataclass(frozen=True)
class Sample:
    id: str
    input: tuple
    weight: tuple
    layer: dict = field(default_factory=dict)

    @property
    def ndim(self):
        return len(self.weight) - 2

    @property
    def ours(self):
        return TCONV[self.ndim]

    @property
    def aten(self):
        return ATEN[self.ndim]

    def tensors(self, device, dtype=torch.float32, requires_grad=True):
        """Random (input, weight, bias)."""
        shapes = self.input, self.weight, (self.weight[1] * self.layer.get("groups", 1),)
        return tuple(torch.randn(s, dtype=dtype, device=device, requires_grad=requires_grad) for s in shapes)

    def arguments(self):
        """(stride, padding, output_padding, groups, dilation) as tconv's operators take them."""
        spatial = ((name, default) for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0)))
        tuples = [[self.layer.get(name, default)] * self.ndim for name, default in spatial]
        return *tuples, self.layer.get("groups", 1), [self.layer.get("dilation", 1)] * self.ndim


SAMPLES = [
    Sample("1d", (2, 3, 4), (3, 2, 3), dict(stride=2, padding=1, output_padding=1)),
    Sample("1d_dilated", (1, 2, 3), (2, 2, 3), dict(stride=2, dilation=2, padding=1)),
    Sample("1d_grouped", (1, 10, 3), (10, 2, 2), dict(groups=2, stride=2)),
    Sample("2d", (2, 3, 3, 2), (3, 2, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    Sample("2d_depthwise", (2, 3, 3, 2), (3, 1, 3, 2), dict(groups=3, stride=2)),
    Sample("3d", (1, 2, 2, 1, 2), (2, 2, 2, 1, 2), dict(stride=2)),
]


def each(samples=SAMPLES):
    return pytest.mark.parametrize("sample", samples, ids=lambda s: s.id)


def sample(name):
    return next(s for s in SAMPLES if s.id == name)


def assert_near(actual, expected, units=32):
    """Equal but for rounding: within some units of the dtype, relative to the largest element.

    Both sides sum in float32 in different orders, so an element that cancels is no nearer than its terms.
    """
    unit = torch.finfo(expected.dtype).eps * expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=units * unit)
