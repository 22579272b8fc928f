"""The few-channel kernel's tile (kernels/few.py): what it is told at compile time, and which problems it takes.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from .configs import Target, cdiv
from .geometry import Geometry

# Groups of at most so many channels on both sides (depthwise layers, and nearly so).
GROUP = 4
# Without groups: at most so many input channels and so many output channels,
FEW_IN, WITH_FEW_IN = 4, 32
# or so many output channels at each precision.  Beyond, the tensor core's tile is full enough: estimated, from 55 % of
# the CUDA cores' multiply-adds and the shift kernel's model.
FEW_OUT = {"half": 5, "widen": 5, "tf32": 8, "tf32x3": 8, "ieee": 8}
MOST_SUMS = 32  # a pixel: registers
MOST_PRODUCTS = 256  # unrolled: code
# Of a thread: its loads of weights serve several pixels, as far as there are registers.
SUMS, READS = 64, 100
SUMS_IN_BLOCKS = 48  # where each has a register for its block besides
# fp32 products that are added one by one: chains of hundreds lose against cuDNN's sums (6.6e-7 against 1.6e-7 at 1400,
# 2.8e-7 against 1.5e-7 at 256; simulated), so blocks of at most so many are, and then the blocks.
CHAIN = 32
AHEAD = 36  # reads of a thread that several unrolled input channels begin with
CODE = 64  # products of an input pixel, up to which several input channels are unrolled
PROGRAMS = 3  # of 128 pixels a multiprocessor; with fewer the loads' latency decides
WARP, WARPS = 32, 4


@dataclass(frozen=True)
class Few:
    """A tile: every phase along height and width of some input-sized pixels, for some output channels."""

    # (offset along height, offset along width, uses) of each input pixel that is read; a use is a sum's number (phase along
    # height, phase along width) and the weight's place (tap along height, along width).
    reads: tuple[tuple[int, int, tuple[tuple[int, int, int], ...]], ...]
    stride_h: int
    stride_w: int
    channels: int  # output channels of a program
    unroll: int  # input channels
    block: int  # input channels whose products are added up before they are added to the rest; 0: all
    pixels: int
    box: int  # of them that lie side by side
    # The weight's strides along output channels, height and width; the launch has them.
    weight: tuple[int, ...] = ()

    @property
    def phases(self) -> int:
        return self.stride_h * self.stride_w

    @property
    def sums(self) -> int:
        return self.phases * self.channels

    def describe(self) -> str:
        return (
            f"{self.pixels} pixels in rows of {self.box}, {self.phases} phases, {self.channels} output channels, "
            f"{len(self.reads)} reads" + (f", sums in blocks of {self.block} channels" if self.block else "")
        )


FULL = "not few channels"


def refuse(geometry: Geometry, c_in: int, c_out: int, large: bool, how: str, source: str) -> str:
    """Why the kernel does not take a forward pass, or "".  c_in and c_out are a group's."""
    _, height, width = geometry.axes3
    few = max(c_in, c_out) <= GROUP if geometry.groups > 1 else c_in <= FEW_IN and c_out <= WITH_FEW_IN
    few = few or (geometry.groups == 1 and c_out <= FEW_OUT.get(how, 8))
    if not few:
        return FULL
    for bad, why in (
        (large, "the few-channel kernel has 32-bit offsets"),
        (source != "width", "the few-channel kernel reads along the width"),
        (
            height.stride * width.stride > MOST_SUMS or height.kernel * width.kernel > MOST_PRODUCTS,
            "the few-channel kernel would have too many phases or taps",
        ),
    ):
        if bad:
            return why
    return ""


@lru_cache(maxsize=4096)
def choose(geometry: Geometry, batch: int, c_in: int, c_out: int, size, half: bool, target: Target) -> Few | None:
    """The tile, or None where too few pixels would leave the GPU waiting.

    Args:
        c_in, c_out: a group's.
        half: whether results are rounded to 16 bits, so that it does not matter how they are added up.
    """
    depth, height, width = geometry.axes3
    output = (1,) * (3 - geometry.ndim) + tuple(geometry.output_size(size))
    found: dict[tuple[int, int], list] = {}
    for a, b in product(range(height.stride), range(width.stride)):
        for (kh, dh), (kw, dw) in product(height.taps(a), width.taps(b)):
            found.setdefault((dh, dw), []).append((a * width.stride + b, kh, kw))
    reads = tuple((dh, dw, tuple(uses)) for (dh, dw), uses in sorted(found.items()))
    phases, products = height.stride * width.stride, height.kernel * width.kernel
    most = max(1, min(MOST_SUMS // phases, MOST_PRODUCTS // products))
    channels = max(n for n in range(1, min(c_out, most) + 1) if c_out % n == 0)
    rows, columns = _extent(geometry, batch, output)
    others = geometry.groups * (c_out // channels) * min(depth.stride, output[0])
    if cdiv(rows * columns, WARPS * WARP) * others < PROGRAMS * target.processors and target.backend != "interpreter":
        return None
    of_channel = height.most_taps * width.most_taps  # products of a sum
    block = 0 if half or of_channel * c_in <= CHAIN else max(1, CHAIN // of_channel)
    a_thread, sums = 8 if len(reads) <= 2 else 4, SUMS_IN_BLOCKS if block else SUMS
    while a_thread > 1 and (a_thread * phases * channels > sums or a_thread * len(reads) > READS):
        a_thread //= 2
    while a_thread > 1 and cdiv(rows * columns, WARPS * WARP * a_thread) * others < PROGRAMS * target.processors:
        a_thread //= 2
    pixels = WARPS * WARP * a_thread
    # Neighbouring rows share input; longer runs are read and written in fewer accesses.
    boxes = [b for b in (16, 32, 64, 128, 256, 512, 1024) if b <= (pixels if output[1] == 1 else 128)]
    box = min(boxes, key=lambda b: cdiv(columns, b) * b * (1 + 8 / b))
    code = products * channels
    fits = [n for n in (4, 2, 1) if n == 1 or (n * len(reads) * a_thread <= AHEAD and n * code <= CODE)]
    unroll = next(n for n in fits if c_in % n == 0 and block % n == 0)
    return Few(reads, height.stride, width.stride, channels, unroll, block, pixels, box)


def _extent(geometry: Geometry, batch: int, output) -> tuple[int, int]:
    """Rows, and columns of each, of the pixels that make all phases; output is of three axes."""
    depth, height, width = (cdiv(o, axis.stride) for o, axis in zip(output, geometry.axes3))
    return batch * depth * height, width


def programs(tile: Few, geometry: Geometry, batch: int, c_out: int, output) -> int:
    """How many programs carry a tile out; c_out is a group's, output of three axes."""
    rows, columns = _extent(geometry, batch, output)
    tiles = cdiv(rows, tile.pixels // tile.box) * cdiv(columns, tile.box)
    return tiles * min(geometry.axes3[0].stride, output[0]) * geometry.groups * (c_out // tile.channels)
