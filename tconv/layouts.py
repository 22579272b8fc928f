"""What launches and plans depend on of tensors: how they lie in memory, and in which format results do."""

from __future__ import annotations

from math import gcd, prod

import torch

from .geometry import Geometry, sizes3

INT32 = 2**31 - 1


def suggested(t: torch.Tensor) -> torch.memory_format:
    """Tensor::suggest_memory_format of torch's C++, which Python lacks: channels_last where the strides are like it,
    whatever the sizes leave open.  torch's own rendering knows symbolic sizes and imports sympy for them, which would
    be 1 to 3 s of a first call."""
    sizes, strides = t.shape, t.stride()
    if not all(type(n) is int for n in (*sizes, *strides)):
        from torch._prims_common import suggest_memory_format

        return suggest_memory_format(t)
    if t.ndim not in (4, 5) or strides[1] == 0:
        return torch.contiguous_format
    least = 0
    for i in (1, *range(t.ndim - 1, 1, -1), 0):
        if sizes[i] == 0 or strides[i] < least or (i == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[i] * sizes[i]
    return torch.channels_last if t.ndim == 4 else torch.channels_last_3d


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """torch's rule for a convolution's result: channels_last when either operand is laid out so."""
    for t in tensors:
        form = suggested(t)
        if form != torch.contiguous_format:
            return form
    return torch.contiguous_format


def empty_output(input, weight, size, channels: int):
    """The uninitialised result of the forward pass (also for fake tensors and symbolic sizes)."""
    return torch.empty(
        (input.shape[0], channels, *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input, weight),
    )


def strides5(t: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Memory strides as (first, second, depth, height, width), 0 where a dimension is absent or of size 1."""
    s = [st if n > 1 else 0 for n, st in zip(t.shape, t.stride())]
    return (s[0], s[1], *([0] * (5 - len(s))), *s[2:])  # type: ignore[return-value]


def is_large(t: torch.Tensor, geometry: Geometry | None = None) -> bool:
    """Whether an element offset can pass 2^31: such tensors take kernels with 64-bit offsets.  A layer's kernels also form
    offsets beyond a tensor's borders, as far as its taps and padding reach."""
    beyond = [a.dilation * (a.kernel - 1) + a.stride + 2 * a.padding for a in geometry.axes] if geometry else []
    beyond = [0] * (t.ndim - len(beyond)) + beyond
    reach = sum((n - 1 + more) * s for n, more, s in zip(t.shape, beyond, t.stride()) if n > 1)
    return max(reach, t.numel()) > INT32 - 2**16


def is_channels_last(t: torch.Tensor) -> bool:
    """Whether neighbouring addresses are neighbouring channels rather than neighbouring pixels."""
    return t.shape[1] > 1 and t.stride(1) == 1 and (t.shape[-1] == 1 or t.stride(-1) != 1)


def layout(t: torch.Tensor, groups: int = 1) -> str:
    """The LAYOUT of kernels.common.known_strides that describes an activation of `groups` channel groups."""
    if is_channels_last(t):
        whole = t.shape[1] // groups % 16 == 0 and all(s % 16 == 0 for i, s in enumerate(strides5(t)) if i != 1)
        return "vectors" if whole else "channels"
    return "width" if t.shape[-1] > 1 and t.stride(-1) == 1 else "strided"


def vector(t: torch.Tensor, source: str) -> int:
    """The power of two, at most 16, that divides an activation's address and strides in elements (but that of the
    contiguous dimension), and its width where that is the contiguous one."""
    contiguous = 1 if source in ("channels", "vectors") else t.ndim - 1
    strides = [st for i, (st, n) in enumerate(zip(t.stride(), t.shape)) if n > 1 and i != contiguous]
    if 0 in strides:  # expanded: no bulk copy takes that
        return 1
    width = [t.shape[-1]] if source == "width" else []
    together = gcd(16, t.data_ptr() // t.element_size(), *strides, *width)
    return together & -together


def channel_vector(t: torch.Tensor, channels: int) -> int:
    """The power of two, at most 16, that divides a group's channels and the other strides, where channels lie side by side; else 1."""
    return gcd(16, channels, *(s for i, s in enumerate(strides5(t)) if i != 1)) if is_channels_last(t) else 1


def along_width(t: torch.Tensor) -> int:
    """How many neighbouring pixels, at most 16 bytes of them, one access can have."""
    return gcd(vector(t, "width"), 16 // t.element_size()) if layout(t) == "width" else 1


def order(weight) -> str:
    """How (output channels, taps) of one input channel lie in memory, as kernels.pack says it."""
    _, w_o, *w_taps = strides5(weight)
    return order_of(w_o, w_taps, weight.shape[1], weight.shape[2:])


def order_of(w_t: int, taps, c_dst: int, kernel) -> str:
    """How (destination channels, taps) of one source channel lie in memory, as kernels.pack says it."""
    k = sizes3(kernel)
    count = prod(k)
    inner = [(k[1] * k[2], k[0]), (k[2], k[1]), (1, k[2])]  # (stride, size) of taps without gaps
    for name, of_channel, of_tap in (("taps", count, 1), ("channels", 1, c_dst)):
        lies = [(of_channel, c_dst), *((stride * of_tap, n) for stride, n in inner)]
        if all(has == wants or n == 1 for has, (wants, n) in zip((w_t, *taps), lies)):
            return name
    return "strided"


def column_steps(weight) -> tuple[int, int]:
    """How many of an input channel's (output channel, tap) pairs lie between output channels, and between taps, of a weight
    without gaps."""
    return (1, weight.shape[1]) if order(weight) == "channels" else (prod(weight.shape[2:]), 1)
