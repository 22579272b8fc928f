"""tconv: transposed convolutions for PyTorch, written in Triton."""

from .convert import convert, override, revert
from .explain import explain
from .functional import conv_transpose1d, conv_transpose2d, conv_transpose3d
from .modules import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d

__version__ = "0.1.0"

__all__ = [
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "explain",
    "override",
    "revert",
]
