"""KernelBench's whole problems: a transposed convolution and the operations behind it, as torch modules.

The operations are read from the shipped data (`ops_after_conv`), each by one line of the table below.  Parameters are
drawn from a normal distribution and batch norms use the batch's statistics, as KernelBench leaves them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cases import Case, _problems

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BINARY: dict[str, Callable] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}


class Step(nn.Module):
    """One operation; `function(x, first, extra)` also sees the convolution's output and the problem's second input."""

    def __init__(self, function: Callable, parameter: torch.Tensor | None = None):
        super().__init__()
        self.function = function
        self.parameter = None if parameter is None else nn.Parameter(parameter)

    def forward(self, x, first, extra):
        return self.function(x, first, extra) if self.parameter is None else self.function(x, self.parameter)


def _simple(function):
    return Step(lambda x, first, extra: function(x))


class Inner(nn.Module):
    """A torch module called as Step is."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x, first, extra):
        return self.module(x)


def _pool(ndim: int, kind: str, size: int):
    pool: Any = {"Max": (F.max_pool2d, F.max_pool3d), "Avg": (F.avg_pool2d, F.avg_pool3d)}[kind][ndim - 2]
    return _simple(lambda x: pool(x, size))


# (pattern, builder(match, channels, spatial axes)); a builder returns a module called as Step is.
_TABLE: tuple[tuple[str, Callable], ...] = (
    (
        r"(add|sub|mul)\(param\[(?:1,)?C(?:,1)*\]\)|bias_add(?:\(param\[.*\]\))?",
        lambda m, c, n: Step(_BINARY[m[1] or "add"], torch.randn(c, *(1,) * n)),
    ),
    (r"(add|sub|mul)\((?:scalar )?param\)", lambda m, c, n: Step(_BINARY[m[1]], torch.randn(1))),
    (r"(add|mul)\(conv_out\)", lambda m, c, n: Step(lambda x, first, extra: _BINARY[m[1]](x, first))),
    (r"add\(tensor input same shape\)", lambda m, c, n: Step(lambda x, first, extra: x + extra)),
    (rf"(add|sub|mul|div)\({_NUMBER}\)", lambda m, c, n: _simple(lambda x: _BINARY[m[1]](x, float(m[2])))),
    (
        rf"(?:clamp|[Hh]ardtanh)\({_NUMBER},{_NUMBER}\)",
        lambda m, c, n: _simple(lambda x: torch.clamp(x, float(m[1]), float(m[2]))),
    ),
    (rf"clamp\(min={_NUMBER}\)", lambda m, c, n: _simple(lambda x: torch.clamp(x, min=float(m[1])))),
    (r"min\(x,0\)", lambda m, c, n: _simple(lambda x: torch.clamp(x, max=0))),
    (
        r"(tanh|gelu|GELU|mish|relu|sigmoid|hardswish)",
        lambda m, c, n: _simple(getattr(torch, m[1]) if m[1] in ("tanh", "sigmoid") else getattr(F, m[1].lower())),
    ),
    (r"swish", lambda m, c, n: _simple(lambda x: torch.sigmoid(x) * x)),
    (r"x\*hardswish\(x\)", lambda m, c, n: _simple(lambda x: x * F.hardswish(x))),
    (r"x\*sigmoid\(x\+3\)/6", lambda m, c, n: _simple(lambda x: x * torch.sigmoid(x + 3) / 6)),
    (rf"leaky_relu\({_NUMBER}\)", lambda m, c, n: _simple(lambda x: F.leaky_relu(x, float(m[1])))),
    (r"(Max|Avg)Pool([23])d\((\d)(?:,\3)?\)", lambda m, c, n: _pool(int(m[2]), m[1], int(m[3]))),
    (r"softmax\(C\)", lambda m, c, n: _simple(lambda x: torch.softmax(x, 1))),
    (r"softmax over flattened spatial", lambda m, c, n: _simple(lambda x: x.flatten(2).softmax(2).view(x.shape))),
    (r"logsumexp\(C(?:,keepdim)?\)", lambda m, c, n: _simple(lambda x: torch.logsumexp(x, 1, keepdim=True))),
    (r"min\(dim=C,keepdim\)", lambda m, c, n: _simple(lambda x: torch.min(x, 1, keepdim=True)[0])),
    (r"max\(C\)", lambda m, c, n: _simple(lambda x: torch.max(x, 1)[0])),
    (r"sum\(dim=C,keepdim\)", lambda m, c, n: _simple(lambda x: torch.sum(x, 1, keepdim=True))),
    (r"sum\(dim=H,keepdim\)", lambda m, c, n: _simple(lambda x: torch.sum(x, 2, keepdim=True))),
    (r"sum\(H,W\)", lambda m, c, n: _simple(lambda x: torch.sum(x, (2, 3)))),
    (r"mean\(dim=2 depth,keepdim\)", lambda m, c, n: _simple(lambda x: torch.mean(x, 2, keepdim=True))),
    (r"mean\(H,W(?:,keepdim)?\).*", lambda m, c, n: _simple(lambda x: torch.mean(x, (2, 3), keepdim=True))),
    (r"sub\(mean over D,H,W\)", lambda m, c, n: _simple(lambda x: x - torch.mean(x, (2, 3, 4), keepdim=True))),
    (r"global_avg_pool", lambda m, c, n: _simple(lambda x: F.adaptive_avg_pool3d(x, 1))),
    (r"BatchNorm([23])d \(train mode\)", lambda m, c, n: Inner((nn.BatchNorm2d, nn.BatchNorm3d)[int(m[1]) - 2](c))),
    (r"GroupNorm\((\d+)\)", lambda m, c, n: Inner(nn.GroupNorm(int(m[1]), c))),
    (r"LayerNorm\(\(?(\d+),?\)?\).*", lambda m, c, n: Inner(nn.LayerNorm(int(m[1])))),
)


def _step(text: str, channels: int, ndim: int) -> nn.Module:
    for pattern, build in _TABLE:
        match = re.fullmatch(pattern, text)
        if match:
            return build(match, channels, ndim)
    raise NotImplementedError(f"no operation is written for {text!r}")


class Problem(nn.Module):
    """A transposed convolution between the operations before it and those after it."""

    def __init__(self, conv: nn.Module, before: list[nn.Module], after: list[nn.Module]):
        super().__init__()
        self.conv_transpose = conv
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)

    def forward(self, x, extra=None):
        for step in self.before:
            x = step(x, None, None)
        first = x = self.conv_transpose(x)
        for step in self.after:
            x = step(x, first, extra)
        return x


class DoubleConv(nn.Sequential):
    """Twice a 3 x 3 convolution, batch norm and a softmax along the width."""

    def __init__(self, c_in: int, c_out: int):
        def half(c):
            return nn.Conv2d(c, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.Softmax(-1)

        super().__init__(*half(c_in), *half(c_out))


class UNetSoftmax(nn.Module):
    """Problem L3/45: a U-Net of four levels, doubling its channels at each."""

    def __init__(self, c_in: int, c_out: int, ups: list):
        super().__init__()
        width = ups[-1].out_channels
        channels = [c_in] + [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(channels))
        self.up = nn.ModuleList(ups)
        self.merge = nn.ModuleList(DoubleConv(2 * up.out_channels, up.out_channels) for up in ups)
        self.last = nn.Conv2d(width, c_out, 1)

    def forward(self, x):
        skips = [x := self.down[0](x)]
        for down in self.down[1:]:
            skips.append(x := down(F.max_pool2d(x, 2)))
        skips.pop()
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat((up(x), skips.pop()), 1))
        return self.last(x)


def layer_module(layer) -> nn.Module:
    """torch's module for a layer of the suites, with fresh weights, on the CPU."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[layer.geometry.ndim - 1]
    return kind(layer.in_channels, layer.out_channels, layer.geometry.kernel, bias=layer.bias, **layer.options)


def build(case: Case) -> nn.Module:
    """The problem's module.  Raises NotImplementedError naming the operation that is not written."""
    entry = _problems()[case.problem]
    convs: list = [layer_module(layer) for layer in case.layers]
    if case.problem == "L3/45":
        return UNetSoftmax(entry["model_input_shapes"][0][1], 4, convs)
    channels, ndim = case.layer.out_channels, case.layer.geometry.ndim
    before, after = [], []
    for text in entry["ops_after_conv"]:
        early = re.fullmatch(r"\[(.*) BEFORE conv\]", text)
        if early:
            before.append(_step(early[1], case.layer.in_channels, ndim))
        else:
            after.append(_step(text, channels, ndim))
    return Problem(convs[0], before, after)


def input_shapes(case: Case) -> list[tuple[int, ...]]:
    """The shapes of the problem's inputs; KernelBench draws them from a uniform distribution."""
    return [tuple(s) for s in _problems()[case.problem]["model_input_shapes"]]
