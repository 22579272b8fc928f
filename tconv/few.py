"""The few-channel kernels' tile (kernels/few.py): what they are told at compile time, and which problems they take.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd, prod

from .configs import WORKSPACE_ELEMENTS, Target, Tile, cdiv
from .geometry import Axis, Geometry, sizes3

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
FEW_FP32_OUT = (
    6  # output channels, forward in IEEE fp32, for which a channels_last input is copied, or sums are cut into parts
)
# backward_input: 16 to 3 channels (k3 s2, 3-d) took half of cuDNN's time, 3 to 64 (k4 s2) twice as long and more.
MOST_IN, MOST_SRC = 4, 32
MOST_SUMS = 32  # a pixel: registers
# Products of a pixel, unrolled: code.  A gradient reads a pixel for each; 64 sums of a weight's gradient take 3 s to compile.
MOST_PRODUCTS = {"forward": 256, "backward_input": 100, "backward_weight": 64}
MOST_LANES = 64
# Of a thread: its loads of weights serve several pixels, as far as there are registers.
SUMS, READS = 64, 108
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
# In IEEE fp32, where the tensor core takes three products, programs of the largest tile that are fewer than LARGE_PROGRAMS each take
# a part of the source channels, of so many at least, until there are PROGRAMS.
PART = 16
WARP, WARPS = 32, 4
REGISTERS = 168  # of a thread of sums in blocks
# Tiles of a program that has one source channel, which share its beginning and its weights, and programs a multiprocessor that
# there are then at least.  Its beginning, mostly divisions, was half of what a tile's thread did: 4 x 768 x 1034, k12 s2 took
# 36 us with one tile and 21 with 6 (H200).  With one read a pixel, many source channels or a loop over the depth's taps, one
# tile was up to 12 % faster.
MOST_TILES, LEAST_WAVES = 8, 16
HELD = 36  # weights of a program, in registers
VECTOR = 2  # channels of a thread's that lie side by side: with 4, 3-d layers took up to 1.5 times as long
# Reads of a program that has all of the depth, forward (k5 s2, 64 channels of 64x64x64: 0.80 ms for 1.00 in bf16).  Gradients,
# and more source channels, were faster (up to 1.4 times) with the depth's taps one after the other.
MOST_READS = 27
# Steps at which a gradient's reads are sorted in registers rather than read apart: 1.2 to 2.7 times as fast (Triton 3.6 reads
# what lies a step apart across threads in the wrong order besides, 3 times as long again); not where the width is odd, and
# each read of its own anyway (16 to 3 channels, 3-d, 63 wide: 1.22 ms for 0.98).
SPLITS = (2, 4)


@dataclass(frozen=True)
class Few(Tile):
    """A tile: some pixels, with every phase along height and width, of some destination channels.

    Of a weight's gradient: some input pixels, with every tap along height and width, of some pairs of channels.
    """

    # (offset along depth, height and width, uses) of each read of the source; a use is the number of a sum (of a phase) and of
    # a tap, both counted along the width first, and the part of the read (`split`).  A weight's gradient has a sum a tap.
    reads: tuple[tuple[int, int, int, tuple[tuple[int, int, int], ...]], ...]
    kernel: tuple[int, ...]  # of `reads`
    # What becomes of the depth: "none" (1-d and 2-d layers have no such axis), "unrolled" (in `reads`), or "looped": a program
    # has one phase of it, and goes through that one's taps.
    depth: str
    phases_d: int  # of the destination, in a program: the stride forward, 1 backward
    phases_h: int
    phases_w: int
    step_d: int  # from one destination pixel of a phase to the next, in source pixels: 1 forward, the stride backward
    step_h: int
    step_w: int
    split: int  # parts of a read, one between the others: step_w of them, or 1 where each is a read of its own
    sums: int  # a pixel
    channels: int  # destination channels of a program, one after the other
    lanes: int  # or side by side, in channels_last; 1: pixels alone lie side by side
    vector: int  # of the lanes, how many a thread has
    own: bool  # whether each lane has a source channel of its own, as in depthwise layers
    alone: bool  # whether a group has one source channel
    across: bool  # whether a program's tiles lie along the width rather than one below the other
    unroll: int  # source channels
    block: int  # source channels whose products are added up before they are added to the rest; 0: all
    pixels: int
    box: int  # of them that lie side by side
    # What to multiply an output channel and a tap's place along depth, height and width by to find its weight; the launch knows.
    weight: tuple[int, ...] = ()

    @property
    def held(self) -> bool:
        """Whether a program loads the weights once, at its beginning."""
        return self.alone and self.depth != "looped" and prod(self.kernel) * self.channels <= HELD

    @property
    def parted(self) -> bool:
        """Whether the sums over source channels may be cut into parts (`parts`)."""
        return not self.alone and self.lanes == 1

    @property
    def several(self) -> bool:
        """Whether a program has several tiles."""
        return self.alone and self.depth != "looped" and len(self.reads) > 1

    def describe(self) -> str:
        return (
            f"{self.pixels} pixels in rows of {self.box}, {self.phases_d * self.phases_h * self.phases_w} phases, "
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


def _reads(axes, forward: bool, split: int):
    """Few.reads of three axes."""
    found: dict[tuple[int, ...], list] = {}
    kernel, strides = [a.kernel for a in axes], [a.stride for a in axes]
    if forward:
        for phase, of_phase in enumerate(product(*map(range, strides))):
            for taps in product(*(axis.taps(a) for axis, a in zip(axes, of_phase))):
                (kd, dd), (kh, dh), (kw, dw) = taps
                found.setdefault((dd, dh, dw), []).append((phase, (kd * kernel[1] + kh) * kernel[2] + kw, 0))
    else:
        for tap, place in enumerate(product(*map(range, kernel))):
            d, h, w = (k * a.dilation - a.padding for k, a in zip(place, axes))
            found.setdefault((d, h, w // split * split), []).append((0, tap, w % split))
    return tuple((*at, tuple(uses)) for at, uses in sorted(found.items()))


def _box(columns: int, pixels: int, most: int) -> int:
    """Of a tile's pixels, how many lie side by side: longer runs are read and written in fewer accesses."""
    boxes = [b for b in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if b <= min(pixels, most)]
    return min(boxes, key=lambda b: cdiv(columns, b) * b * (1 + 8 / b))


@lru_cache(maxsize=4096)
def choose(
    direction: str, geometry: Geometry, batch: int, c_src: int, c_dst: int, size, half: bool, last: bool, target: Target,
    portable: bool = False, cut: bool = False,
) -> Few | None:  # fmt: skip
    """The tile, or None where too few pixels would leave the GPU waiting.

    Args:
        c_src, c_dst: a group's.
        size: the input's.
        half: whether results are rounded to 16 bits, so that it does not matter how they are added up.
        last: whether channels lie side by side (by_channels).
        portable: whether the portable kernels are what is left.
        cut: whether the sums over source channels may be cut into parts.
    """
    sizes = batch, c_src, c_dst, size, half, last, target, portable, cut
    if geometry.ndim < 3:
        return _choose(direction, geometry, "none", *sizes)
    found = None
    if direction == "forward" and (c_src == 1 or (c_src <= FEW_IN and not last)):
        products, phases = geometry.taps, prod(geometry.stride)
        if (
            products <= MOST_PRODUCTS[direction]
            and phases <= MOST_SUMS
            and len(_reads(geometry.axes, True, 1)) <= MOST_READS
        ):
            found = _choose(direction, geometry, "unrolled", *sizes)
    return found or _choose(direction, geometry, "looped", *sizes)


def _choose(
    direction: str, geometry: Geometry, depth: str, batch: int, c_src: int, c_dst: int, size, half: bool, last: bool,
    target: Target, portable: bool, cut: bool,
) -> Few | None:  # fmt: skip
    """`choose`, with the depth as Few.depth."""
    forward = direction == "forward"
    one = Axis(1, 1, 0, 1)
    looped = geometry.axes3[0] if depth == "looped" else one
    axes = (one if depth == "looped" else geometry.axes3[0], *geometry.axes3[1:])
    strides = tuple(a.stride for a in axes)
    split = 1 if forward or last else strides[-1]
    if split not in SPLITS or geometry.output_size(size)[-1] % split:  # then no access has two of them
        split = 1
    reads = _reads(axes, forward, split)
    loads = len(reads) * split
    phases = prod(strides) if forward else 1
    products = prod(a.kernel for a in axes)
    own = geometry.groups > 1
    lanes = gcd(MOST_LANES, geometry.groups * c_dst) if last else 1
    channels = unroll = 1
    block = 0
    rows, columns = _extent(geometry, batch, size, forward)
    others = geometry.groups * c_dst // lanes
    if direction == "backward_weight":
        others, limit = others * c_src, SUMS // products
    else:
        of_channel = prod(a.most_taps for a in axes) if forward else products  # products of a sum
        of_block = max(BLOCK, (of_channel * c_src) ** 0.5)
        block = 0 if half or of_channel * c_src <= CHAIN else max(1, round(of_block / of_channel))
        if not last:
            most = max(1, min(MOST_SUMS // phases, MOST_PRODUCTS[direction] // products))
            channels = max(n for n in range(1, min(c_dst, most) + 1) if c_dst % n == 0)
        others = others // channels * (min(looped.stride, sizes3(geometry.output_size(size))[0]) if forward else 1)
        sums = SUMS_IN_BLOCKS if block else SUMS
        limit = min(sums // (phases * channels), READS // loads)
    # Neighbouring channels: 16 bytes of them, in 16 bits half as many where each has many reads.
    least = 1 if not last else 8 if half and 8 * loads <= READS else 4
    # In 16 bits 16 pixels spilled 52 bytes on sm_80, 96 on sm_86 and sm_89, 32 on Hopper.
    spills = half and target.backend == "cuda" and target.arch < 90
    a_thread = (8 if spills else 16) if last else 8 if loads <= 2 else 4
    while a_thread > least and a_thread > limit:
        a_thread //= 2
    long = c_src > FEW_IN
    enough, threads = (PROGRAMS if long else SHORT_PROGRAMS) * target.processors, WARPS * WARP
    if direction != "backward_weight":
        programs = lambda n: cdiv(rows * columns * lanes, threads * n) * others  # noqa: E731
        most, large = programs(a_thread), LARGE_PROGRAMS * target.processors
        whole = programs(least) >= enough and (not long or own or portable or most >= large)
        whole |= target.backend == "interpreter"
        parted = cut and long and not own and not last and most * (c_src // PART) >= large
        if not whole and not parted:
            return None
        while whole and a_thread > least and programs(a_thread) < enough:
            a_thread //= 2
        code = products * channels
        fits = [n for n in (4, 2, 1) if n == 1 or (n * loads * a_thread <= AHEAD and n * code <= CODE)]
        unroll = next(n for n in fits if c_src % n == 0 and block % n == 0)
    pixels = threads * a_thread // lanes
    # Neighbouring rows share what they read.
    height = axes[1]
    box = _box(columns, pixels, pixels if (height.kernel, height.stride) == (1, 1) else 128)
    (phases_d, phases_h, phases_w), (step_d, step_h, step_w) = (strides, (1, 1, 1)) if forward else ((1, 1, 1), strides)
    return Few(
        reads=reads,
        kernel=tuple(a.kernel for a in axes),
        depth=depth,
        phases_d=phases_d,
        phases_h=phases_h,
        phases_w=phases_w,
        step_d=step_d,
        step_h=step_h,
        step_w=step_w,
        split=split,
        sums=products if direction == "backward_weight" else phases * channels,
        channels=channels,
        lanes=lanes,
        vector=VECTOR if last else 1,
        own=own,
        alone=c_src == 1,
        across=geometry.ndim == 1,
        unroll=unroll,
        block=block,
        pixels=pixels,
        box=box,
    )


def _extent(geometry: Geometry, batch: int, size, forward: bool) -> tuple[int, int]:
    """Rows, and columns of each, of the pixels of a tile's grid: those of the input, or that make the output's phases."""
    depth, height, width = sizes3(size)
    if forward:
        output = sizes3(geometry.output_size(size))
        depth, height, width = (cdiv(o, axis.stride) for o, axis in zip(output, geometry.axes3))
    return batch * depth * height, width


def parts(tile: Few, geometry: Geometry, batch: int, c_src: int, c_dst: int, size, target: Target) -> int:
    """Into how many parts a forward pass cuts its sums, if it may; c_src and c_dst are a group's, size the input's."""
    if not tile.parted:
        return 1
    programs = grid(tile, geometry, batch, c_dst, size, True, target.processors)[0]
    if programs >= LARGE_PROGRAMS * target.processors:
        return 1
    outputs = batch * geometry.groups * c_dst * prod(geometry.output_size(size))
    want = min(
        cdiv(PROGRAMS * target.processors, max(programs, 1)), c_src // PART, WORKSPACE_ELEMENTS // max(outputs, 1)
    )
    return cdiv(c_src, per_part(tile, c_src, max(want, 1)))


def per_part(tile: Few, c_src: int, count: int) -> int:
    """Source channels of each of so many parts, of the last one perhaps fewer."""
    return cdiv(cdiv(c_src, count), tile.unroll) * tile.unroll


def tiles(tile: Few, geometry: Geometry, batch: int, size, forward: bool) -> int:
    """How many tiles of pixels there are; size is the input's."""
    rows, columns = _extent(geometry, batch, size, forward)
    return cdiv(rows, tile.pixels // tile.box) * cdiv(columns, tile.box)


def grid(
    tile: Few, geometry: Geometry, batch: int, c_dst: int, size, forward: bool, processors: int
) -> tuple[int, int, int]:
    """(programs, parts, tiles a part) of a gather; c_dst is a group's, size the input's."""
    looped = forward and tile.depth == "looped"
    rows, columns = _extent(geometry, batch, size, forward)
    shared, others = cdiv(rows, tile.pixels // tile.box), cdiv(columns, tile.box)
    if tile.across:
        shared, others = others, shared
    others *= geometry.groups * c_dst // (tile.channels * tile.lanes)
    others *= min(geometry.axes3[0].stride, sizes3(geometry.output_size(size))[0]) if looped else 1
    most = MOST_TILES if tile.several else 1
    each = max(1, min(most, shared * others // max(1, LEAST_WAVES * processors)))
    parts = cdiv(shared, each)
    return others * parts, parts, cdiv(shared, parts)
