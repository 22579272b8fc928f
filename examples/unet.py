"""The U-Net generator of pix2pix (Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017).

Written out from the paper and its reference code: every level halves the image with a convolution (kernel 4, stride
2, padding 1) and doubles it again with a transposed convolution of the same numbers, and hands what it saw to the
decoder over a skip connection.  Instance norm stands in for batch norm, as the reference code offers for a batch of
one image, and the decoder's dropout is left out, so that two runs on one input can be compared.
"""

import torch
from torch import nn


class UNet(nn.Module):
    """(N, in_channels, S, S) to (N, out_channels, S, S) in -1 to 1, for S a multiple of 2 ** depth.

    Level i has width * min(2 ** i, 8) channels.  pix2pix itself is width 64 and depth 8, for 256 x 256 pixels.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 3, width: int = 64, depth: int = 8):
        super().__init__()
        channels = [width * min(2**level, 8) for level in range(depth)]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()  # up[i] undoes down[i]
        for level, here in enumerate(channels):
            outermost, innermost = level == 0, level == depth - 1
            above = [in_channels, out_channels] if outermost else [channels[level - 1]] * 2
            down = [nn.Conv2d(above[0], here, 4, stride=2, padding=1)]
            up = [nn.ReLU(), nn.ConvTranspose2d(here if innermost else 2 * here, above[1], 4, stride=2, padding=1)]
            if not outermost:
                down.insert(0, nn.LeakyReLU(0.2))
            if not outermost and not innermost:
                down.append(nn.InstanceNorm2d(here))
            up.append(nn.Tanh() if outermost else nn.InstanceNorm2d(above[1]))
            self.down.append(nn.Sequential(*down))
            self.up.append(nn.Sequential(*up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for up in reversed(self.up[1:]):
            x = torch.cat([skips.pop(), up(x)], dim=1)
        return self.up[0](x)
