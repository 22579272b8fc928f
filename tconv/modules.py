"""torch.nn's transposed convolution modules, on tconv's kernels."""

from __future__ import annotations

import torch.fx
from torch import nn

from .functional import conv_transpose

torch.fx.wrap("conv_transpose")  # symbolic tracing records the call instead of tracing what is behind it


class _Forward:
    """forward of the modules below; everything else is torch's own."""

    def forward(self, input, output_size=None):
        n = len(self.kernel_size)
        # _output_padding validates output_size (batched or not) and is torch's own.
        output_padding = (
            self.output_padding
            if output_size is None
            else self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation)
        )
        return conv_transpose(
            n, input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ConvTranspose1d(_Forward, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d on tconv's kernels: same arguments, parameters, state_dict and repr."""


class ConvTranspose2d(_Forward, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on tconv's kernels: same arguments, parameters, state_dict and repr."""


class ConvTranspose3d(_Forward, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d on tconv's kernels: same arguments, parameters, state_dict and repr."""


class LazyConvTranspose1d(_Forward, nn.LazyConvTranspose1d):  # type: ignore[misc]
    """What `convert` makes of torch.nn.LazyConvTranspose1d; becomes ConvTranspose1d at its first input."""

    cls_to_become = ConvTranspose1d  # type: ignore[assignment]


class LazyConvTranspose2d(_Forward, nn.LazyConvTranspose2d):  # type: ignore[misc]
    """What `convert` makes of torch.nn.LazyConvTranspose2d; becomes ConvTranspose2d at its first input."""

    cls_to_become = ConvTranspose2d  # type: ignore[assignment]


class LazyConvTranspose3d(_Forward, nn.LazyConvTranspose3d):  # type: ignore[misc]
    """What `convert` makes of torch.nn.LazyConvTranspose3d; becomes ConvTranspose3d at its first input."""

    cls_to_become = ConvTranspose3d  # type: ignore[assignment]


COUNTERPARTS = {
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.LazyConvTranspose1d: LazyConvTranspose1d,
    nn.LazyConvTranspose2d: LazyConvTranspose2d,
    nn.LazyConvTranspose3d: LazyConvTranspose3d,
}
