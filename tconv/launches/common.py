"""Arguments that kernels of several families have in common."""

from __future__ import annotations

import torch

from ..dispatch import INTERPRET
from ..geometry import Geometry

# A launch with these may begin before the one ahead of it has ended, if that lets it; the interpreter knows no such thing.
OVERLAPPING = {} if INTERPRET else {"launch_pdl": True}


def axis_scalars(geometry: Geometry, inverse: bool) -> tuple[int, ...]:
    """kernel, stride, padding and dilation (and gcd and inverse) of the three axes, in the kernels' order."""
    axes = geometry.axes3
    names = ("kernel", "stride", "padding", "dilation") + (("gcd", "inverse") if inverse else ())
    return tuple(getattr(a, name) for name in names for a in axes)


def accumulator(dtype: torch.dtype):
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def of_partials(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial sums of tensors of a dtype are kept: what `accumulator` is on the device."""
    return torch.float64 if dtype is torch.float64 else torch.float32
