"""One pass of one layer at one size, at which precision it is computed, and what a decision about it says.

`families` decides from a Problem, `dispatch` asks them in turn for a Plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from . import blocks, columns, few, grid, long, patches, rows, shift
from .configs import Config, Target
from .geometry import Geometry

PASSES = ("forward", "backward_input", "backward_weight")
HALF = (torch.float16, torch.bfloat16)

# Groups of at most this many source channels and destination channels take the direct kernels: a
# tensor-core tile has 16 of each at least, so that less than a sixteenth of it would be useful.
DIRECT_CHANNELS = 4
# TF32 wants this many channels a group on both sides; cuDNN computes narrower groups in IEEE fp32, and
# there tf32x3 costs nothing, since such layers are bound by memory (L1/72 and L1/75 of KernelBench).
TF32_GROUP_CHANNELS = 32
# Sums of fewer products take IEEE multiply-adds instead of tf32x3: three TF32 products have an error of their own
# (1.5e-7 in root mean square) below which a short fp32 chain stays (4e-8 at 8 products).  At 48 products (L1/75) the
# chain's largest error was the larger one, at 36 it was not.  Where TF32 is allowed, cuDNN computes such sums in fp32
# too, unless both sides have many channels (L1/81: 32 products, 32 to 64 channels, TF32).
# In channels_last it computes forward sums with TF32_GROUP_CHANNELS input channels at TF32, whatever the output has (UNETR: 32
# products, 32 to 16 channels; LinkNet and MedNeXt, to 20 and 14, where its benchmark mode is free to choose).
IEEE_PRODUCTS = 40
# Longer sums take tf32x3 where TF32 is allowed: the tensor core truncates as it accumulates, and after 86,000 products
# (FCN-32s, k64) that bias had grown to the size of TF32's own rounding.  tf32x3 adds in fp32 once a tile of K;
# backward_weight splits its sums (configs.splits).
TF32_PRODUCTS = 1 << 15


# The one AMD GPU whose tensor cores Triton gives TF32.
TF32_HIP = 942


@dataclass(frozen=True)
class Problem:
    """One pass of one layer at one size: what `plan` decides from."""

    direction: str  # one of PASSES
    geometry: Geometry
    batch: int
    c_in: int
    c_out: int
    input_size: tuple[int, ...]
    dtype: torch.dtype
    tf32: bool  # torch's flag for fp32 convolutions, as read at the call
    source: str  # the LAYOUT (kernels.common.known_strides) of the tensor that the pass gathers from
    destination: str = "width"  # that of the result
    vector: int = 1  # so many elements, at most 16, divide the source's address and all its strides but 1
    large: bool = False  # whether element offsets need 64 bits
    dense: bool = True  # whether both tensors fill their memory, contiguous or channels_last
    # Whether source and destination are channels_last, their channels and strides whole vectors of 16 elements.
    whole: tuple[bool, bool] = (False, False)
    # Forward: how the weight lies (layouts.order), or "pieces": output channels innermost, in whole 16 bytes.
    weight: str = "taps"
    # Forward: whether 16 bytes divide the addresses of input and weight, and the weight's stride from one input channel to the next.
    aligned: bool = False
    bias: bool = False  # forward: whether there is one, which torch adds in a pass of its own

    @property
    def channels_last(self) -> bool:
        return self.source in ("channels", "vectors")

    @property
    def channels(self) -> tuple[int, int]:
        """A group's input and output channels."""
        return self.c_in // self.geometry.groups, self.c_out // self.geometry.groups

    @property
    def pixels(self) -> int:
        """Those of the input's whole batch."""
        return self.batch * prod(self.input_size)

    @property
    def most_taps(self) -> int:
        """How many taps a phase of the forward pass has, at most."""
        return prod(a.most_taps for a in self.geometry.axes)

    @property
    def products(self) -> int:
        """How many products one element of the pass's result sums, at most."""
        c_in, c_out = self.channels
        if self.direction == "forward":
            return c_in * self.most_taps
        if self.direction == "backward_input":
            return c_out * self.geometry.taps
        return self.pixels

    @property
    def products_of_output(self) -> float:
        """In how many products an element of the output takes part, on average (without groups)."""
        return self.c_in * self.geometry.taps / prod(self.geometry.stride)

    @property
    def is_direct(self) -> bool:
        """Whether a tensor core's tile would be mostly padding."""
        return self.geometry.groups > 1 and max(self.channels) <= DIRECT_CHANNELS


@dataclass(frozen=True)
class Plan:
    """A decision: the kernel family ("few", "rows", "columns", "long", "patches", "grid", "blocks", "shift", "gemm", "direct" or "aten"), its configuration and
    the reason."""

    family: str
    reason: str
    precision: str = ""
    config: (
        Config
        | few.Few
        | rows.Rows
        | columns.Columns
        | columns.WeightColumns
        | long.Phases
        | long.InputColumns
        | patches.Patches
        | grid.Grid
        | blocks.Blocks
        | shift.Shift
        | None
    ) = None
    splits: int = 1
    tiles_per_split: int = 0
    # Whether what the pass reads is first copied, its channels innermost, at TF32 rounded: for the shift kernel its input, of
    # strips with zeros behind rows; for gradients the activations.  For the few-channel kernels, its pixels innermost.
    arranged: bool = False
    lasting: bool = True  # whether the next call of its kind may repeat it: not before the device could be probed


def precision(problem: Problem, target: Target) -> str:
    """The PRECISION of kernels.common.matmul at which a problem's products are formed."""
    if problem.dtype in HALF:
        return "widen" if target.backend == "interpreter" and problem.dtype is torch.bfloat16 else "half"
    if problem.dtype is torch.float64:
        return "ieee"
    products, g = problem.products, problem.geometry.groups
    short = products < IEEE_PRODUCTS
    wide = min(problem.channels) >= TF32_GROUP_CHANNELS
    if problem.direction == "forward" and problem.destination in ("channels", "vectors") and g == 1:
        wide |= problem.c_in >= TF32_GROUP_CHANNELS
    if problem.direction == "backward_weight":
        allowed = not short and (wide or g == 1)
    else:
        allowed = products <= TF32_PRODUCTS and (wide or (g == 1 and not short))
    if problem.tf32 and allowed and (target.backend != "hip" or target.arch == TF32_HIP):
        return "tf32"
    return "ieee" if short or target.backend == "hip" else "tf32x3"
