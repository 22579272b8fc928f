"""The KernelBench face: functions and modules shaped as that benchmark's problems ask for them.

`triton_conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups)` and
`ModelNew(in_channels, out_channels, kernel_size, ...)`, with their 1-d and 3-d counterparts.
"""

from __future__ import annotations

from torch import nn

from .functional import conv_transpose1d, conv_transpose2d, conv_transpose3d
from .modules import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d


def triton_conv_transpose1d(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """`tconv.conv_transpose1d` with KernelBench's name and argument order."""
    return conv_transpose1d(x, weight, bias, stride, padding, output_padding, groups, dilation)


def triton_conv_transpose2d(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """`tconv.conv_transpose2d` with KernelBench's name and argument order."""
    return conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)


def triton_conv_transpose3d(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """`tconv.conv_transpose3d` with KernelBench's name and argument order."""
    return conv_transpose3d(x, weight, bias, stride, padding, output_padding, groups, dilation)


class _Model(nn.Module):
    """One transposed convolution, the attribute `conv_transpose`; hyper-parameters are ints or tuples."""

    layer: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: int | tuple[int, ...] = 1,
    ):
        super().__init__()
        self.conv_transpose = self.layer(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=bias,
            dilation=dilation,
        )

    def forward(self, x):
        return self.conv_transpose(x)


class ModelNew1d(_Model):
    """KernelBench's 1-d model: (N, in_channels, L)."""

    layer = ConvTranspose1d


class ModelNew(_Model):
    """KernelBench's 2-d model: (N, in_channels, H, W)."""

    layer = ConvTranspose2d


class ModelNew3d(_Model):
    """KernelBench's 3-d model: (N, in_channels, D, H, W)."""

    layer = ConvTranspose3d


ModelNew2d = ModelNew
