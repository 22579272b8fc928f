"""The few-channel kernels' tile (kernels/few.py): what they are told at compile time, and which problems they take.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd

from .configs import Target, cdiv
from .geometry import Geometry, sizes3

# Groups of at most so many channels on both sides (depthwise layers, and nearly so).  A weight's gradient reads the pixels of
# both anew for each pair of channels (L1/75, 8 to 16 channels, 3.94 ms in fp32; the portable kernels 2.89), and in 16 bits has
# cuDNN's tensor cores to beat.
GROUP, GROUP_OF_WEIGHTS, GROUP_OF_HALF_WEIGHTS = 16, 8, 4
# Without groups, forward: at most so many input channels and so many output channels,
FEW_IN, WITH_FEW_IN = 4, 32
# or so many output channels at each precision.  Beyond, the tensor core is faster even if most of its tile is padding (H100):
# 16 to 8 channels (k4 s2, 3-d) 0.315 ms in TF32 and 0.457 here, 96 to 8 channels 0.36 and 1.0; 64 to 3 (k4 s2) 0.48 in bf16
# and 0.94 here, in TF32 1.18 and 0.89.  Sums short enough for IEEE multiply-adds have no tensor core to go to.
FEW_OUT = {"half": 1, "widen": 1, "tf32": 4, "tf32x3": 8, "ieee": 64}
# and beside the portable kernels alone (64 to 3, k4 s2: 1.54 ms in bf16, 2.80 in TF32).
FEW_OUT_PORTABLE = {"half": 5, "widen": 5, "tf32": 8, "tf32x3": 8, "ieee": 64}
# backward_input: 16 to 3 channels (k3 s2, 3-d) took half of cuDNN's time, 3 to 64 (k4 s2) twice as long and more.
MOST_IN, MOST_SRC = 4, 32
MOST_SUMS = 32  # a pixel: registers
# Products of a pixel, unrolled: code.  A gradient reads a pixel for each; 36 sums of a weight's gradient take 3 s to compile,
# 64 take minutes.
MOST_PRODUCTS = {"forward": 256, "backward_input": 100, "backward_weight": 36}
MOST_LANES = 64
# Of a thread: its loads of weights serve several pixels, as far as there are registers.
SUMS, READS = 64, 100
SUMS_IN_BLOCKS = 48  # where each has a register for its block besides
# fp32 products that are added one by one: chains of hundreds lose against cuDNN's sums (6.6e-7 against 1.6e-7 at 1400,
# 2.8e-7 against 1.5e-7 at 256; simulated), so beyond CHAIN, blocks of about as many as there are blocks are, but of about BLOCK
# at least, and then the blocks.  Of L1/75's 48 products, blocks of 30 left a largest error of 2.4e-6 (cuDNN 1.2e-6); blocks of
# 12 leave three quarters of it (simulated).
CHAIN, BLOCK = 32, 12
AHEAD = 36  # reads of a thread that several unrolled input channels begin with
CODE = 64  # products of an input pixel, up to which several input channels are unrolled
# Programs a multiprocessor: of 128 pixels where there are many source channels, with fewer the loads' latency decides; and of
# the largest tile, since smaller ones repeat the loads of weights (64x64x32x32 to 3: 128 programs, 0.086 ms, and 0.051 on the
# tensor core; 1x56x270x480 to 1: 253 programs, 0.157 and 0.287).
PROGRAMS, LARGE_PROGRAMS = 3, 1.5
SHORT_PROGRAMS = 0.5  # and where there are few source channels
WARP, WARPS = 32, 4


@dataclass(frozen=True)
class Few:
    """A tile: some pixels, with every phase along height and width, of some destination channels.

    Of a weight's gradient: some input pixels, with every tap along height and width, of some pairs of channels.
    """

    # (offset along height, offset along width, uses) of each source pixel that is read; a use is a sum's number (phase along
    # height, phase along width) and the weight's place (tap along height, along width).  A weight's gradient has a sum for
    # each read.
    reads: tuple[tuple[int, int, tuple[tuple[int, int, int], ...]], ...]
    phases_h: int  # of the destination: the stride forward, 1 backward
    phases_w: int
    step_h: int  # from one destination pixel of a phase to the next, in source pixels: 1 forward, the stride backward
    step_w: int
    channels: int  # destination channels of a program, one after the other
    lanes: int  # or side by side, in channels_last; 1: pixels alone lie side by side
    own: bool  # whether each lane has a source channel of its own, as in depthwise layers
    unroll: int  # source channels
    block: int  # source channels whose products are added up before they are added to the rest; 0: all
    pixels: int
    box: int  # of them that lie side by side
    # What to multiply a use's output channel, tap along height and along width by to find its weight; the launch knows.
    weight: tuple[int, ...] = ()

    @property
    def sums(self) -> int:
        return self.phases_h * self.phases_w * self.channels

    def describe(self) -> str:
        return (
            f"{self.pixels} pixels in rows of {self.box}, {self.phases_h * self.phases_w} phases, "
            f"{self.channels * self.lanes} channels, {len(self.reads)} reads"
            + (f", sums in blocks of {self.block} channels" if self.block else "")
        )


FULL = "not few channels"


def by_channels(groups: int, c_src: int, whole: tuple[bool, bool]) -> bool:
    """Whether channels lie side by side in a tile: the destination's, and the source's where each has one of its own.
    whole: Problem.whole."""
    return whole[1] and (c_src <= FEW_IN if groups == 1 else whole[0])


def refuse(
    direction: str, geometry: Geometry, c_src: int, c_dst: int, large: bool, how: str, source: str, destination: str,
    whole: tuple[bool, bool], portable: bool = False,
) -> str:  # fmt: skip
    """Why the kernels do not take a pass, or "".  c_src and c_dst are a group's; a weight's gradient has the input as its
    source, the output's gradient as its destination.  portable: whether the portable kernels are what is left."""
    _, height, width = geometry.axes3
    is_weight, grouped = direction == "backward_weight", geometry.groups > 1
    most_out = FEW_OUT_PORTABLE if portable else FEW_OUT
    if grouped:
        weights = GROUP_OF_HALF_WEIGHTS if how in ("half", "widen") else GROUP_OF_WEIGHTS
        few = max(c_src, c_dst) <= (weights if is_weight else GROUP)
    else:
        few = (
            (c_src <= FEW_IN and c_dst <= WITH_FEW_IN) or c_dst <= most_out.get(how, 8)
            if direction == "forward"
            else not is_weight and c_dst <= MOST_IN and c_src <= MOST_SRC
        )
    if not few:
        return FULL
    last = by_channels(geometry.groups, c_src, whole)
    # Neighbouring pixels of so few channels share sectors all the same.
    along = source == "width" or (source == "channels" and not is_weight and geometry.groups * c_src <= FEW_IN)
    phases = height.stride * width.stride if direction == "forward" else 1
    products = height.kernel * width.kernel
    many = products > MOST_PRODUCTS[direction] or (is_weight and last and products * 4 > READS)
    for bad, why in (
        (large, "the few-channel kernels have 32-bit offsets"),
        (
            not last and (not along or (is_weight and destination != "width")),
            "the few-channel kernels read along the width, or channels in whole vectors",
        ),
        (last and grouped and max(c_src, c_dst) > 1, "several channels a group in channels_last"),
        (many or phases > MOST_SUMS, "the few-channel kernels would have too many phases or taps"),
    ):
        if bad:
            return why
    return ""


def _reads(geometry: Geometry, forward: bool):
    """Few.reads of a layer."""
    _, height, width = geometry.axes3
    found: dict[tuple[int, int], list] = {}
    if forward:
        for a, b in product(range(height.stride), range(width.stride)):
            for (kh, dh), (kw, dw) in product(height.taps(a), width.taps(b)):
                found.setdefault((dh, dw), []).append((a * width.stride + b, kh, kw))
    else:
        for kh, kw in product(range(height.kernel), range(width.kernel)):
            at = kh * height.dilation - height.padding, kw * width.dilation - width.padding
            found[at] = [(0, kh, kw)]
    return tuple((dh, dw, tuple(uses)) for (dh, dw), uses in sorted(found.items()))


def _box(columns: int, pixels: int, most: int) -> int:
    """Of a tile's pixels, how many lie side by side: longer runs are read and written in fewer accesses."""
    boxes = [b for b in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if b <= min(pixels, most)]
    return min(boxes, key=lambda b: cdiv(columns, b) * b * (1 + 8 / b))


@lru_cache(maxsize=4096)
def choose(
    direction: str, geometry: Geometry, batch: int, c_src: int, c_dst: int, size, half: bool, last: bool, target: Target,
    portable: bool = False,
) -> Few | None:  # fmt: skip
    """The tile, or None where too few pixels would leave the GPU waiting.

    Args:
        c_src, c_dst: a group's.
        size: the input's.
        half: whether results are rounded to 16 bits, so that it does not matter how they are added up.
        last: whether channels lie side by side (by_channels).
        portable: whether the portable kernels are what is left.
    """
    forward = direction == "forward"
    depth, height, width = geometry.axes3
    reads = _reads(geometry, forward)
    phases = height.stride * width.stride if forward else 1
    products = height.kernel * width.kernel
    own = geometry.groups > 1
    lanes = gcd(MOST_LANES, geometry.groups * c_dst) if last else 1
    channels = unroll = 1
    block = 0
    rows, columns = _extent(geometry, batch, size, forward)
    others = geometry.groups * c_dst // lanes
    if direction == "backward_weight":
        others, limit = others * c_src, SUMS // len(reads)
    else:
        of_channel = height.most_taps * width.most_taps if forward else products  # products of a sum
        of_block = max(BLOCK, (of_channel * c_src) ** 0.5)
        block = 0 if half or of_channel * c_src <= CHAIN else max(1, round(of_block / of_channel))
        if not last:
            most = max(1, min(MOST_SUMS // phases, MOST_PRODUCTS[direction] // products))
            channels = max(n for n in range(1, min(c_dst, most) + 1) if c_dst % n == 0)
        others = others // channels * (min(depth.stride, sizes3(geometry.output_size(size))[0]) if forward else 1)
        sums = SUMS_IN_BLOCKS if block else SUMS
        limit = min(sums // (phases * channels), READS // len(reads))
    # Neighbouring channels: 16 bytes of them, in 16 bits half as many where each has many reads.
    least = 1 if not last else 8 if half and 8 * len(reads) <= READS else 4
    # In 16 bits 16 pixels spilled 52 bytes on sm_80, 96 on sm_86 and sm_89, 32 on Hopper.
    spills = half and target.backend == "cuda" and target.arch < 90
    a_thread = (8 if spills else 16) if last else 8 if len(reads) <= 2 else 4
    while a_thread > least and a_thread > limit:
        a_thread //= 2
    long = c_src > FEW_IN
    enough, threads = (PROGRAMS if long else SHORT_PROGRAMS) * target.processors, WARPS * WARP
    if direction != "backward_weight":
        fewest, largest = (cdiv(rows * columns * lanes, threads * n) * others for n in (least, a_thread))
        too_few = fewest < enough or (
            long and not own and not portable and largest < LARGE_PROGRAMS * target.processors
        )
        if too_few and target.backend != "interpreter":
            return None
        while a_thread > least and cdiv(rows * columns * lanes, threads * a_thread) * others < enough:
            a_thread //= 2
        code = products * channels
        fits = [n for n in (4, 2, 1) if n == 1 or (n * len(reads) * a_thread <= AHEAD and n * code <= CODE)]
        unroll = next(n for n in fits if c_src % n == 0 and block % n == 0)
    pixels = threads * a_thread // lanes
    # Neighbouring rows share what they read.
    box = _box(columns, pixels, pixels if (height.kernel, height.stride) == (1, 1) else 128)
    steps = (1, 1) if forward else (height.stride, width.stride)
    shape = (height.stride, width.stride) if forward else (1, 1)
    return Few(reads, *shape, *steps, channels, lanes, own, unroll, block, pixels, box)


def _extent(geometry: Geometry, batch: int, size, forward: bool) -> tuple[int, int]:
    """Rows, and columns of each, of the pixels of a tile's grid: those of the input, or that make the output's phases."""
    depth, height, width = sizes3(size)
    if forward:
        output = sizes3(geometry.output_size(size))
        depth, height, width = (cdiv(o, axis.stride) for o, axis in zip(output, geometry.axes3))
    return batch * depth * height, width


def tiles(tile: Few, geometry: Geometry, batch: int, size, forward: bool) -> int:
    """How many tiles of pixels there are; size is the input's."""
    rows, columns = _extent(geometry, batch, size, forward)
    return cdiv(rows, tile.pixels // tile.box) * cdiv(columns, tile.box)


def programs(tile: Few, geometry: Geometry, batch: int, c_dst: int, size, forward: bool) -> int:
    """How many programs carry out a gather; c_dst is a group's, size the input's."""
    phases = min(geometry.axes3[0].stride, sizes3(geometry.output_size(size))[0]) if forward else 1
    return (
        tiles(tile, geometry, batch, size, forward) * phases * (geometry.groups * c_dst // (tile.channels * tile.lanes))
    )
