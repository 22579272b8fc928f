"""The shift kernel's tile (kernels/shift.py): what it is told at compile time, and which one a problem takes.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import gcd, prod
from typing import NamedTuple

from .configs import WORKSPACE_ELEMENTS, Target, Tile, cdiv, power_of_two
from .geometry import Axis, sizes3

SHARED = 232448 - 2048  # bytes of shared memory a block may have on sm_90, less the barriers
M = 64  # rows of an accumulator: output channels, times the phases along the width that are folded into them
# The releases whose Gluon the kernel compiles with; it has run under the first.
TRITON = ((3, 6), (3, 7), (3, 8), (3, 9))
ROUNDING_TRITON = 3, 7  # from this release on, a bulk copy can round fp32 to TF32 as it brings it
LEAST_CHANNELS = 16  # of the input
MOST_TAPS = 25  # along height and width that are unrolled: compilation takes longer than 6 s beyond
MOST_IEEE_TAPS = 25  # along height and width, in IEEE fp32: cuDNN's algorithms for larger kernels add less often
SHORT_IEEE_SUM = 128  # products of an output, for which that does not matter (FCN's k64 s32 and k16 s8 have 84)
MOST_ADDITIONS = 80  # in IEEE fp32, of sums of 16 channels; of 32 channels they are half as many
MOST_WIDTH = 32  # blocks of weights along the width, which are always unrolled
MOST_STRIDE = 256  # along the height: the phases are looked through for each tile that is tried
LONG = 9  # taps along height and width, from which on half the code is worth having
MOST_PHASES = 8  # along the height that have code of their own
MOST_ROWS, MOST_DIVISOR = 1 << 23, 1 << 15  # of all images, and of one: kernels.shift._split divides these
MOST_ACCUMULATORS = 4  # of 64 pixels each
MOST_WIDTH_PHASES = MOST_ACCUMULATORS * M  # of one channel
MOST_PARTS = 16  # of the sums over channels
LONG_STRIDE = 16  # along the width: beyond, kernels may be longer and few tiles fit
MOST_SPANS = 8  # strides that such a kernel may be long: offsets of an accumulator
STRIP_COPY = 64  # pixels
MOST_STRIP_WIDTH = 256  # from row to row of a strip, which is known at compile time


@dataclass(frozen=True)
class Fold:
    """How the phases along the width share accumulators: those from first[g] on, many[g] of them, are accumulator g's,
    each a row of a channel's `phases` rows.  With one phase an accumulator its taps are the weight's own; with more, an
    accumulator has a block of weights for each input offset that its phases read, which must be the same for all."""

    phases: int  # rows of a channel in an accumulator, a power of two
    accumulators: int  # 1 to 4
    first: tuple[int, ...]
    many: tuple[int, ...]
    low: tuple[int, ...]  # of each accumulator, the first input offset and how many follow, where phases > 1
    count: tuple[int, ...]
    exact: bool  # whether all phases of an accumulator read all its offsets
    spread: int = 1  # where there is one phase: so many accumulators have M output channels each, of one reading

    @property
    def channels(self) -> int:
        """Output channels of an accumulator."""
        return M // self.phases

    @property
    def of_tile(self) -> int:
        """Output channels of a tile."""
        return self.channels * self.spread

    @property
    def joined(self) -> int:
        """Rows of all accumulators side by side, for which a third one is padded to four."""
        return self.phases * power_of_two(self.accumulators // self.spread, 1, MOST_ACCUMULATORS)


@lru_cache(maxsize=4096)
def fold(width: Axis, phases: int, accumulators: int) -> Fold:
    """The Fold of an axis; phases * accumulators must be at least its stride.  Two accumulators part where each can be
    exact, if there is such a place: of k = 2 s, where the offsets change (stride - padding, in the easiest case).  More part
    wherever offsets change: of k = 2 s + 1, for the one phase of three taps and those before and behind it."""
    if accumulators == 1:
        return _parted(width, phases, (0,), (width.stride,))
    if width.stride == 1:
        one = _parted(width, phases, (0,) * accumulators, (1,) * accumulators)
        return replace(one, spread=accumulators)
    if accumulators > 2:
        first = [0]
        for b in range(1, width.stride):
            alike = [d for _, d in width.taps(b)] == [d for _, d in width.taps(first[-1])]
            if not alike or b - first[-1] == phases:
                first.append(b)
        many = [end - begin for begin, end in zip(first, [*first[1:], width.stride])]
        return _parted(width, phases, tuple(first), tuple(many))
    places = range(min(phases, width.stride), width.stride - min(phases, width.stride) - 1, -1)
    parted = [_parted(width, phases, (0, n), (n, width.stride - n)) for n in places]
    return next((each for each in parted if each.exact), parted[0])


def _parted(width: Axis, phases: int, first: tuple[int, ...], many: tuple[int, ...]) -> Fold:
    low, count, exact = [], [], True
    for a, n in zip(first, many):
        read = [[d for _, d in width.taps(b)] for b in range(a, a + n)]
        offsets = {d for each in read for d in each}
        low.append(min(offsets, default=0))
        count.append(max(offsets) - low[-1] + 1 if offsets else 0)
        exact = exact and all(set(each) == offsets and len(each) == count[-1] for each in read)
    return Fold(phases, len(first), first, many, tuple(low), tuple(count), exact)


def folds(width: Axis, c_out: int) -> list[tuple[int, int]]:
    """(phases, accumulators) worth trying."""
    if width.stride == 1:
        return [(1, n) for n in (1, 2, 4) if n == 1 or c_out > M * n // 2]
    if width.stride == 2:  # folded, few output channels fill an accumulator's rows
        return [(1, 2), (2, 1)] if c_out <= M // 2 else [(1, 2)]
    whole = power_of_two(width.stride, 4, MOST_WIDTH_PHASES)
    halves = (whole // 2, 2)
    if whole <= 8 and not fold(width, *halves).exact:
        halves = whole, 2
    parts = [(1 << i, fold(width, 1 << i, MOST_ACCUMULATORS).accumulators) for i in range(M.bit_length())]
    fewest = [each for each in parts if 2 < each[1] <= MOST_ACCUMULATORS][:1]
    one = [(whole, 1)] * (whole <= 8 or LONG_STRIDE < whole <= M)
    return [halves] * (halves[0] <= M) + one + fewest


HOW = {"bulk": "bulk copies", "staged": "bulk copies and threads", "threads": "threads"}
STAGING = 4  # chunks
# How eight warps share the multiplications.  In two groups, one stores while the other multiplies; together they are
# half the code to compile.
WORK = {"together": "eight warps a tile", "halves": "four warps half a tile", "tiles": "four warps a tile"}


def bytes_of(dtype: str) -> int:
    """Of an element of a Shift's dtype."""
    return 2 if dtype in ("fp16", "bf16") else 4


@dataclass(frozen=True)
class Shift(Tile):
    """A tile of the shift kernel, in the form that it takes."""

    # By phase along the height, or one for all where they are `alike` or read `by_row`: (accumulator, weight block,
    # shift in pixels) of each tap; where one is for all, blocks count from the phase's first tap.
    taps: tuple[tuple[tuple[int, int, int], ...], ...]
    blocks_w: int  # blocks of weights of one tap along depth and height and one block of channels
    whole: int  # blocks of weights of all taps and one block of channels
    parts: int  # of an operand: at tf32x3 it is the sum of two TF32 values
    # First input row that output row 0 reads: of each phase along the height, or of all where one tile does them all.
    low: tuple[int, ...]
    low_w: int
    depth: Axis  # its taps are summed one after the other: a reading of the input each
    volume: bool  # whether there is a depth: an image of more than one plane, or an axis that does something
    height: Axis
    by_row: bool  # whether its taps are readings as well, rather than shifts
    alike: bool  # whether, unrolled, its phases differ in their first tap alone: the others follow at the same shifts
    stride_w: int
    fold: Fold
    # Whether a tile is a strip: pixels one after the other, from row to row, of an input whose channels are innermost and which has
    # zeros enough between its rows, planes and images.
    strip: bool
    rows: int  # of a tile, without halo; of a strip pixels
    halo_rows: int  # of a strip bulk copies
    box: int  # pixels of a row in shared memory, halo included; for strips from row to row
    useful: int  # those of which outputs exist
    pixels: int  # of a consumer
    work: str  # of the consumers: WORK
    size: int  # bytes of an element
    dtype: str  # "fp16", "bf16", "tf32" or "tf32x3"
    kb: int  # channels of a stage
    stages: int
    part: int  # pixels from part to part of a stage
    pitch: int  # and from stage to stage
    ring: int  # pixels of all stages and slack
    slots: int  # blocks of weights in shared memory, of as many parts each
    resident: bool  # they are all of a channel tile's weights
    chunk: int  # pixels that pass through the output buffer at once
    src_layout: str
    dst_layout: str
    how: str  # the input comes by "bulk" copies, by "staged" ones with threads behind them, or by "threads" alone
    vector: int  # what divides the input's strides: so many neighbouring pixels or channels a load brings
    dst_vector: int  # and a store of the output takes
    dst_channels: int  # of a tile's channels, how many are stored: fewer where the output has few
    bring: int  # pixels that the producers' threads load at once
    staging: int  # chunks of `bring` pixels that bulk copies bring ahead of the threads
    registers: tuple[int, int]  # a thread, of the second consumer and of who brings the input
    producers: int  # warps
    partial: bool  # whether a tile sums some of the channels alone, in fp32
    raw: bool = False  # whether blocks of weights come from the weight as it lies, in channels_last, without packing

    @property
    def groups(self) -> int:
        """Of four warps, that make a consumer."""
        return 2 if self.work == "together" else 1

    @property
    def consumers(self) -> int:
        return 1 if self.work == "together" else 2

    @property
    def of_tile(self) -> int:
        """Pixels of a tile."""
        return self.pixels * (2 if self.work == "halves" else 1)

    @property
    def readings(self) -> float:
        """How often a tile reads a block of channels, on average."""
        axes = (self.depth, self.height) if self.by_row else (self.depth,)
        return prod(a.kernel / a.stride for a in axes)

    @property
    def joined(self) -> int:
        """Phases along the width that are interleaved before the store."""
        return self.fold.joined if self.dst_layout == "width" else self.fold.phases

    @property
    def dst_size(self) -> int:
        """Bytes of an element of the output."""
        return 4 if self.partial else self.size

    @property
    def rounds(self) -> bool:
        """Whether what bulk copies bring must be TF32 values already, for want of a thread that rounds them."""
        return self.dtype == "tf32" and self.how == "bulk"

    @property
    def of_copy(self) -> int:
        """Pixels of a bulk copy into the ring."""
        return STRIP_COPY if self.strip else self.box

    @property
    def brings(self) -> int:
        return cdiv(self.halo_rows * self.box, self.bring)

    @property
    def all_phases(self) -> bool:
        """Whether a tile does all phases along the height, from one reading of its input."""
        return len(self.low) == 1

    def describe(self) -> str:
        """In words."""
        folded = f", {self.fold.phases} phases folded" if self.fold.phases > 1 else ""
        pixels = (
            f"{self.rows} pixels in rows of {self.box}"
            if self.strip
            else f"{self.rows} rows of {self.useful} + {self.box - self.useful} pixels"
        )
        return (
            f"{pixels}{folded}, {self.kb} channels, "
            f"{self.stages} stages, {self.slots} blocks of weights{' (all)' if self.resident else ''}, "
            f"{WORK[self.work]}, input by {HOW[self.how]}{', the weight as it lies' if self.raw else ''}"
        )


@dataclass(frozen=True)
class Probed(Tile):
    """The tile of the probe (probe.py): what the views of shared memory ask of a Shift."""

    dtype: str  # "bf16" or "tf32"
    size: int  # bytes of an element
    pixels: int = 64  # of a product
    stages: int = 2
    pitch: int = 128  # pixels from stage to stage
    ring: int = 256  # of all stages
    shifts: tuple[int, ...] = (
        0,
        1,
        7,
        64,
    )  # pixels from which products begin in each stage; rows are swizzled by the eight

    @property
    def kb(self) -> int:
        """Channels of a pixel, which has the 128 bytes that swizzled rows have at most."""
        return 128 // self.size


@lru_cache(maxsize=4096)
def make(
    axes: tuple[Axis, Axis, Axis],
    dtype: str,
    c_in: int,
    c_out: int,
    box: int,
    pixels: int,
    kb: int,
    work: str,
    all_phases: bool,
    by_row: bool,
    folded: tuple[int, int],
    how: str,
    strip: bool,
    src_layout: str,
    dst_layout: str,
    src_vector: int,
    dst_vector: int,
    volume: bool,
    in_parts: bool = False,
) -> Shift | None:
    """The tile with `box` pixels a row and `pixels` of each group of four warps, or None where it does not fit."""
    depth, height, width = axes
    size = bytes_of(dtype)
    dst_size = 4 if in_parts else size
    dst_vector = gcd(dst_vector, 16 // dst_size)
    by_h = [height.taps(a) for a in range(height.stride)]
    by_w = [width.taps(b) for b in range(width.stride)]
    # `pixels` are four warps'; a consumer and a tile have as many, or twice.
    of_consumer, of_tile = pixels * (2 if work == "together" else 1), pixels * (1 if work == "tiles" else 2)
    rows = of_tile if strip else of_tile // box
    f = fold(width, *folded)
    # (accumulator, block of weights, input offset) of each tap along the width, and how many blocks there are.
    if f.spread > 1:
        across = [(g, kw * f.spread + g, d) for kw, d in by_w[0] for g in range(f.spread)]
        blocks_w = width.kernel * f.spread
    elif f.phases == 1:
        across = [(b, kw, d) for b, taps in enumerate(by_w) for kw, d in taps]
        blocks_w = width.kernel
    else:
        spans = [(g, low + i) for g, (low, n) in enumerate(zip(f.low, f.count)) for i in range(n)]
        across = [(g, e, d) for e, (g, d) in enumerate(spans)]
        blocks_w = len(spans)
        # Where a phase does not read what its neighbours in the accumulator read, a zero weight would meet that input,
        # and make an infinity in it a NaN in an output that it does not reach.
        if not f.exact:
            return None
    if len(across) > MOST_WIDTH:
        return None
    columns = [d for _, _, d in across]
    low_w, high_w = min(columns, default=0), max(columns, default=0)
    staged = how == "staged"
    # More would spill.
    narrow = src_layout == "channels" and src_vector * size < 16
    bring = {"bulk": 1, "staged": min(64, box & -box), "threads": 128 if dtype == "tf32" and not narrow else 64}[how]
    looped = (depth, height) if by_row else (depth,)
    if staged and bring < 16:
        return None
    # Where tiles of a phase read nothing, copies ahead have none to go on to, and a consumer would run ahead over the
    # other's tiles and take a stage's old contents for new.
    if (staged or work == "tiles") and not all(axis.taps(a) for axis in looped for a in range(axis.stride)):
        return None
    # Bulk copies may arrive out of order.  A group that takes every other tile does not wait for the other's, so a stage's
    # block must follow one of its own: were it the other's, not there yet, the barrier would look like the one before it.
    in_turn = work == "tiles" and how == "bulk"
    if in_turn and any(len({len(axis.taps(a)) for a in range(axis.stride)}) > 1 for axis in looped):
        return None
    staging = STAGING if staged else 0
    align = 1 if src_layout == "channels" else 16 // size if staged else src_vector  # a bulk copy starts at 16 bytes
    low_w -= low_w % align
    useful = box if strip else box - (high_w - low_w)
    if dst_layout == "width" and f.joined != width.stride:
        dst_vector = 1  # the last phases do not exist
    if strip and dst_layout == "width":
        dst_vector = gcd(dst_vector, box * f.joined)
    step = max(align, cdiv(dst_vector, width.stride)) if dst_layout == "width" and not strip else align
    useful -= useful % step
    if not rows or useful < 1 or box % align:
        return None
    if dst_layout == "channels" and (f.channels * dst_size < 32 or width.stride > LONG_STRIDE):
        return None  # the least that a buffer's swizzle takes; and of many phases a thread would have too many pixels to find
    block = M * kb * size
    whole = depth.kernel * height.kernel * blocks_w
    parts = 2 if dtype == "tf32x3" else 1
    # Blocks of one tile.
    read_in = cdiv(c_in, kb) * prod(max(len(axis.taps(a)) for a in range(axis.stride)) for axis in looped)
    buffered = f.joined // f.phases if dst_layout == "width" else 1
    most = min(pixels, 16384 // (M * buffered * dst_size))
    lows = [min((d for _, d in taps), default=0) for taps in by_h]
    if all_phases:
        lows = [min(lows)] * height.stride
    unrolled = [[(kh, d - low) for kh, d in taps] for taps, low in zip(by_h, lows)]
    shifts = {tuple(d for _, d in each) for each in unrolled}
    alike = not by_row and height.stride > 1 and len(shifts) == 1 and all(by_h)
    if by_row:
        unrolled = [[(0, 0)]]
    elif alike:
        unrolled = [[(kh - unrolled[0][0][0], d) for kh, d in unrolled[0]]]
    span = max((d for taps in unrolled for _, d in taps), default=0)
    taps = tuple(
        tuple((g, kh * blocks_w + e, dh * box + dw - low_w) for kh, dh in each for g, e, dw in across)
        for each in unrolled
    )
    furthest = max((s for row in taps for _, _, s in row), default=0) + of_tile
    halo_rows, of_copy = (cdiv(furthest, STRIP_COPY), STRIP_COPY) if strip else (rows + span, box)
    unit = max(of_consumer, bring)
    part = cdiv(halo_rows * of_copy, unit) * unit
    pitch = part * parts
    furthest += pitch - part
    slack = cdiv(max(0, furthest - pitch), 8) * 8 * kb * size
    stage = pitch * kb * size
    # All phases release a tile's blocks with the last of them, and with a tile each, blocks of two tiles are under way:
    # stages for two tiles, or for one block more, without which the ring would stand still.
    held = all_phases and (height.stride > 1 or work == "tiles")
    wanted = (2,) if not held else (2 * read_in,) if in_turn else (2 * read_in, read_in + 1)
    # All weights stay in shared memory where they fit.
    for least, resident, chunk in product(wanted, (True, False), (most, most // 2)):
        # A tile a phase and a tile of some channels stream their weights, a tile each does not.
        if (resident and (in_parts or not all_phases)) or (not resident and work == "tiles"):
            continue
        buffers = 2 * M * chunk * buffered * dst_size + staging * bring * kb * size
        slots = whole * cdiv(c_in, kb)
        if not resident:
            slots = (8 if buffers + slack + least * stage + 8 * block <= SHARED else 4) // parts
        stages = (SHARED - buffers - slack - slots * parts * block) // stage
        if stages >= least:
            break
    else:
        return None
    stages = min(stages, max(4, wanted[0]))
    if in_turn:
        stages -= stages % (2 * read_in)
    low = tuple(lows[:1] if all_phases else lows)
    # Eight rows of the buffer are swizzled together, and cannot be told apart.
    dst_channels = min(f.channels, power_of_two(c_out, 8 if dst_layout == "width" else 1, M))
    # So that fewest are spilt; a warp for the weights takes the registers of four.
    if how == "bulk":
        registers = 240, 24
    elif resident:
        registers = (192, 128) if size == 4 else (184, 136)
    else:
        registers = 184, 120
    return Shift(
        taps, blocks_w, whole, parts, low, low_w, depth, volume, height, by_row, alike, width.stride, f,
        strip, rows, halo_rows, box, useful, of_consumer, work, size, dtype, kb, stages, part,
        pitch, stages * pitch + slack // (kb * size), slots, resident, chunk * of_consumer // pixels,
        src_layout, dst_layout, how, src_vector, dst_vector, dst_channels, bring, staging, registers,
        1 if how == "bulk" else 4, in_parts,
    )  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """How a grid of CTAs walks over a problem's tiles: what the kernel is told at run time."""

    image: int  # rows from plane to plane, zero rows between them included
    planes: int  # of an image, of one phase along the depth
    blocks: int  # of channels
    tiles_co: int
    tiles_w: int
    tiles: int
    grid: int
    processors: int
    width: int  # of the input
    of_part: int  # blocks of channels that a part of the sums has
    of_round: int  # tiles of rows, of all channel tiles and phases, that the grid does at once, rounded up
    spin: int  # by how much the phases' order turns with each of these rounds, so that a CTA's next tile is of another phase


def apart(axes, size, output) -> tuple[int, ...]:
    """How many planes, rows and columns (of an input's size or more, zeros behind it) an image must have for strips: so many that
    no tap reaches from one image, plane or row to the next, and that as many outputs of each phase find their place.  Tiles of
    rows need the rows alone: bulk copies and masks see to planes and columns."""
    found = []
    for axis, n, o in zip(axes, size, output):
        quotient = cdiv(o, axis.stride)
        reach = [d for a in range(axis.stride) for _, d in axis.taps(a)]
        found.append(max(quotient + max(0, *reach), n - min(0, *reach)))
    return tuple(found)


def walk(tile: Shift, axes, batch, c_in, c_out, size, output, processors, parts: int = 1) -> Walk:
    """Planes (of a volume; otherwise images) are stacked along the height, so far apart that a tap never reaches from
    one to the next.  Axes and sizes are those of depth, height and width.  parts: those into which the channels are cut,
    each with a grid of its own."""
    planes, _, columns_out = (cdiv(o, a.stride) for o, a in zip(output, axes))
    planes_apart, image, columns_apart = apart(axes, size, output)
    blocks, tiles_co, tiles_w = cdiv(c_in, tile.kb), cdiv(c_out, tile.fold.of_tile), cdiv(columns_out, tile.useful)
    if tile.strip:
        assert tile.box >= columns_apart
        planes, tiles_w = planes_apart, 1
    rows = batch * planes * image * (tile.box if tile.strip else 1)
    phases = len(tile.low) * tile.depth.stride
    tiles = tiles_co * phases * tiles_w * cdiv(rows, tile.rows)
    grid = min(tiles, max(1, processors // parts))
    if tile.resident:  # a CTA keeps the weights of one channel tile
        grid = max(tiles_co, grid // tiles_co * tiles_co)
    of_round = cdiv(grid, tiles_co * phases)
    # Of uneven rounds most phases change by themselves.
    spin = 0 if grid % tiles_co else (1 - grid // tiles_co) % phases
    return Walk(
        image, planes, blocks, tiles_co, tiles_w, tiles, grid, processors, size[2], cdiv(blocks, parts), of_round, spin
    )


# What one SM of an H200 does in a cycle, for comparing tiles with each other: fitted to the times of 604 tiles of 17
# layers (docs/kernels.md), of which the tile chosen so was 4 % slower than the best in geometric mean.
MULTIPLY_ADDS = {2: 2000, 4: 1000}  # by bytes of an element
PRODUCTS = {1: 1, 2: 3}  # by parts of an operand
NARROW = 0.95  # of that rate with 64 pixels a consumer: operand A takes more of shared memory's rate
BLOCK, TAP = 150, 7  # cycles of a block of channels and of a tap of it, beside the multiply-adds
BRING = {"bulk": 200, "staged": 21, "threads": 11}  # bytes of input
COPY = {"bulk": 110, "staged": 400, "threads": 120}  # cycles of a row that is copied or a chunk that is brought
WEIGHTS, WEIGHT_COPY = 90, 7  # bytes of streamed weights, cycles of a block of them
# Bytes through the output buffer and from there to memory: 19 and 30 a cycle together, measured with all of a tile's
# channels and 16 bytes of channels a thread.  For fewer both are estimates.
BUFFER, STORE = 60, {"width": 28, "channels": 60}
NARROW_LOAD = 8  # cycles of a warp's load in addition to those of 16 bytes a thread, estimated
LINE, SHORT = 128, 0.26  # shorter runs than so many bytes slow accesses down, by this power of what is missing
OVERLAP = 0.3  # of the second longest of what runs side by side adds to the longest
TILE = 2000  # cycles of a tile beside everything else
HALF_THE_CODE = 0.9  # a tile with half the code to compile may take so much longer
# So much longer than the rest says take tiles of which each phase along the height has code of its own: 1.2 by 26 tiles of one phase that
# were timed with and without, about 1.1 by a dozen of all phases.
OWN_CODE = 1.1
MEMORY = 14  # bytes of the GPU's memory
# So many of an output with rows of 16-bit pixels that are no multiple of four, which begin and end within a sector; of runs shorter
# than RUN bytes less by this power of what is missing, and of strips of odd rows, whose stores run from row to row, by a factor.  48
# tiles of six layers took 0.8 to 1.2 times as long on an H200.
RAGGED, RUN, RAGGED_SHORT, RAGGED_STRIPS = 5.0, 256, 0.43, 0.9
FEW_PIXELS = 0.25  # stores of one pixel, or two, rather than four take longer by this power
# A copy of the input before the kernel, and the addition of partial sums behind it: cycles of a launch; the share of MEMORY
# that a copy reaches (that of 16-bit pixels by single loads second) and its most elements; and bytes of sums added.
# Of 347 layers timed with and without on an H200, the choice so was 3 % slower than the best in geometric mean; tiles through
# registers took 10 % longer than the rest says.
LAUNCH, COPIED, MOST_COPIED, ADDED = 4000, (0.75, 0.4), 1 << 28, 15
THROUGH_REGISTERS = 1.1


def cycles(tile: Shift, walked: Walk, read: int, written: int, width: int) -> float:
    """About how many cycles the busiest SM takes; read, written: bytes of input and output; width: of the output."""
    phases = tile.height.stride if tile.all_phases else 1
    readings = tile.readings
    taps = tile.blocks_w * readings * (1 if tile.by_row else tile.height.kernel * phases / tile.height.stride)
    taps *= PRODUCTS[tile.parts]
    blocks = walked.of_part * readings
    channels = walked.of_part * tile.kb
    rate = MULTIPLY_ADDS[tile.size] * (NARROW if tile.pixels // tile.groups == 64 else 1.0)
    multiply = tile.of_tile * M * channels * taps / rate + blocks * phases * BLOCK + TAP * taps * walked.of_part
    run = min(1.0, tile.useful * tile.joined * tile.dst_size / LINE) if tile.dst_layout == "width" else 1.0
    stores = tile.fold.phases * tile.dst_channels / STORE[tile.dst_layout]
    stores *= (
        16 / (tile.dst_vector * tile.dst_size) if tile.dst_layout == "channels" else (4 / tile.dst_vector) ** FEW_PIXELS
    )
    store = tile.of_tile * phases * tile.fold.accumulators * tile.dst_size * (M / BUFFER + stores) / run**SHORT
    gathered = tile.src_layout == "width" and tile.how == "threads"
    run = min(1.0, min(tile.box, walked.width) * tile.size / LINE) if gathered else 1.0
    brought = readings * tile.halo_rows * tile.of_copy * channels * tile.size
    bring = brought / BRING[tile.how] / run**SHORT
    if tile.src_layout == "channels" and tile.how == "threads":
        bring += brought / 32 * (1 / (tile.vector * tile.size) - 1 / 16) * NARROW_LOAD
    bring += COPY[tile.how] * blocks * (tile.halo_rows if tile.how == "bulk" else tile.brings)
    weights = 0 if tile.resident else taps * walked.of_part * (M * tile.kb * tile.size / WEIGHTS + WEIGHT_COPY)
    # With a tile each, one group of warps multiplies while the other stores.
    multiply = multiply + store if tile.work != "tiles" else max(multiply, (multiply + store) / 2)
    _, second, longest = sorted((multiply, bring, weights))
    # What is released with the last phase alone leaves no stages to bring the next tile meanwhile; bulk copies make up
    # for it, threads do not.
    waits = phases > 1 and tile.how != "bulk" and tile.stages < 2 * blocks
    step = (longest + second * (1.0 if waits else OVERLAP) + TILE) * (OWN_CODE if len(tile.taps) > 1 else 1.0)
    busiest = cdiv(walked.tiles, walked.grid) * step + store + bring / blocks
    memory = (read + written) / MEMORY
    if width % 4 and tile.dst_layout == "width" and tile.dst_size == 2:
        run = min(width, tile.useful * tile.stride_w) * tile.dst_size
        rate = RAGGED * min(1.0, run / RUN) ** RAGGED_SHORT * (RAGGED_STRIPS if tile.strip and width % 2 else 1.0)
        memory = max(memory, written / rate)
    memory /= walked.processors
    both = max(busiest, memory) + 0.1 * min(busiest, memory)  # of tiles that wait for memory, the one that works less
    return both if tile.how == "bulk" else both * THROUGH_REGISTERS


def candidates(
    axes, dtype: str, columns_out: int, c_in: int, c_out: int, how: str, vector: int, strip: int = 0
) -> Iterator[tuple]:
    """(box, pixels, kb, work, all_phases, by_row, (folded phases, accumulators), how, whether it is a strip) worth trying;
    strip: from row to row of strips, or 0."""
    _, height, width = axes
    offsets = [d for b in range(width.stride) for _, d in width.taps(b)]
    halo = max(offsets) - min(offsets)
    size = bytes_of(dtype)
    boxes = {8, 16, 32, 64, 128, 256}
    if how == "threads" and (exact := cdiv(columns_out + halo + (vector if vector > 1 else 0), vector) * vector) <= 64:
        boxes.add(exact)
    if how == "staged" and (exact := cdiv(columns_out + halo + 16 // size, 16) * 16) <= 256:
        boxes.add(exact)
    if strip:
        boxes = {strip}
    # Rows of 128 bytes; in two parts also of 64, so that as many pixels fit.
    wide = power_of_two(c_in, 16, 128 // size)
    additions = cdiv(c_in, 16) * prod(cdiv(axis.kernel, axis.stride) for axis in axes)
    depths = sorted({wide, 16}) if dtype == "tf32x3" and additions <= MOST_ADDITIONS else [wide]
    code = height.kernel * min(width.kernel, MOST_WIDTH) * (2 if dtype == "tf32x3" else 1)
    by_row = code > MOST_TAPS or height.stride > MOST_PHASES
    # Code of its own for each phase along the height, twice, is more than the instruction cache holds.  Bulk copies can read a
    # tile once for each tap instead; three or four accumulators are so much code to store that threads do so, too.
    differ = len({len(height.taps(a)) for a in range(height.stride)}) > 1
    # Without strides a tile stores once after many taps, and little is lost where nobody stores while others multiply.
    long = height.stride == width.stride == 1 and height.kernel * width.kernel >= LONG
    whole = "together" if long else "halves"
    # The accumulators have at most 256 columns together, and 128 each where the producers' threads leave a consumer
    # 192 registers.
    bulk = how == "bulk"
    for folded, pixels in product(folds(width, c_out), (64, 128, 256)):
        for work, all_phases in ((whole, True), (whole, False), ("tiles", True)):
            fits = pixels * folded[1] <= 256 and (bulk or pixels <= 128) and (all_phases or height.stride > 1)
            if dtype == "tf32x3":  # a tap's sum has registers, too
                fits = fits and pixels * (folded[1] + 1) <= 256
            # These spill accumulators, by the kilobyte.
            if all_phases and height.stride > 1 and not bulk:
                fits = fits and pixels * folded[1] <= 128
            if folded[0] > 1:
                fits = fits and pixels <= 128
            # Four, and the store of many phases with gaps among them, need the registers that there are where no threads
            # bring the input.
            fits = fits and (
                bulk
                or width.stride == 1
                or (folded[1] < 4 and (folded[0] <= 8 or fold(width, *folded).joined == width.stride))
            )
            rows = by_row or (differ and (folded[1] > 2 or (bulk and not all_phases)))
            fits = fits and not (rows and all_phases and height.stride > 1)
            # Of 16-bit tiles that pass through registers, one for both consumers was 1.25 to 1.4 times as fast.
            if fits and (work == whole or bulk or size == 4):
                for kb, box in product(depths, sorted(boxes)):
                    if strip or box <= pixels * (2 if work == whole else 1):
                        yield box, pixels, kb, work, all_phases, rows, folded, how, strip > 0


# Channels of a group, and of its output, and how many groups: they are launches of their own.  In channels_last cuDNN is faster
# (dense layers like StyleGAN2's groups, 512 to 256 channels, k3 s2: 0.87x of its speed in 16 bits, 0.91x at TF32).
WIDE, MOST_GROUPS = 64, 32


def unavailable(target: Target) -> str:
    """Why a target has no Hopper kernels, or ""."""
    if not target.is_hopper:
        return "the shift kernel is for sm_90"
    if target.triton not in TRITON:
        return f"the shift kernel was not tried with Triton {'.'.join(map(str, target.triton))}"
    return target.fault


def refuse(geometry, c_in, c_out, large, precision, source, destination, target: Target) -> str:
    """Why the shift kernel does not take a problem, or "".  c_in and c_out are a group's."""
    depth, height, width = geometry.axes3
    if missing := unavailable(target):
        return missing
    for bad, why in (
        (
            geometry.groups > 1
            and (geometry.groups > MOST_GROUPS or min(c_in, c_out) < WIDE or not source == destination == "width"),
            f"the shift kernel has up to {MOST_GROUPS} groups, of {WIDE} channels and more, in contiguous tensors",
        ),
        (precision not in ("half", "tf32", "tf32x3"), f"the shift kernel has no {precision} yet"),
        (
            precision == "tf32x3"
            and height.kernel * width.kernel > MOST_IEEE_TAPS
            and c_in * prod(axis.most_taps for axis in geometry.axes3) > SHORT_IEEE_SUM,
            f"in IEEE fp32 the shift kernel has up to {MOST_IEEE_TAPS} taps along height and width, or sums of up to {SHORT_IEEE_SUM} "
            "products: beyond, torch's largest error can be smaller",
        ),
        (
            max(depth.stride, depth.padding, height.padding) > MOST_DIVISOR,
            f"the shift kernel has strides up to {MOST_DIVISOR} along the depth, paddings along depth and height",
        ),
        (height.stride > MOST_STRIDE, f"the shift kernel has strides up to {MOST_STRIDE} along the height"),
        (width.stride > MOST_WIDTH_PHASES, f"the shift kernel has strides up to {MOST_WIDTH_PHASES} along the width"),
        (
            width.kernel > max(MOST_WIDTH, MOST_SPANS * width.stride if width.stride > LONG_STRIDE else 0),
            f"the shift kernel has up to {MOST_WIDTH} taps along the width, or {MOST_SPANS} strides above {LONG_STRIDE}",
        ),
        (large, "the shift kernel has 32-bit offsets"),
        (c_in < LEAST_CHANNELS, "few input channels"),
        ("strided" in (source, destination), "of the tensors' strides"),
    ):
        if bad:
            return why
    return ""


def takes_raw(tile: Shift, weight: str, c_out: int) -> bool:
    """Whether a tile's blocks of weights come from the weight as it lies (problem.Problem.weight): wgmma takes operand A with its
    rows innermost in 16 bits alone, and folded phases lie in places of their own.  Of fewer output channels than a block has, bulk
    copies of short rows took longer than packing (up to 1.16 times; 0.96 in geometric mean over 140 layers from 64 channels on)."""
    return weight == "pieces" and tile.size == 2 and tile.fold.phases == 1 and c_out >= M


# Below this share of the tensor core's rate or of the memory's, whichever is higher, by the model above, the portable
# kernels fill the GPU better.
LEAST_SHARE = 0.012
LEAST_SHARE_OF_GROUP = 0.04  # of each of several groups, which are as many launches
# What a call takes beside the model's cycles, by what an H200 took for small layers (docs/kernels.md): nanoseconds, and those of
# each KB of weight that is packed, or comes as it lies.
CLOCK, BESIDE, PACKED, AS_IT_LIES = 1.755, 4000, 0.6, 0.15


def arranging(
    batch: int, c_in: int, pixels: int, padded: int, element: int, vector: int, last: bool, processors: int
) -> float:
    """About how many cycles a copy of the input takes that has its channels innermost, in whole pieces of 16 bytes, and so many
    pixels an image."""
    moved = element * batch * (pixels * c_in + padded * cdiv(c_in, 16 // element) * 16 // element)
    return LAUNCH + moved / (MEMORY * COPIED[not last and vector * element < 4] * processors)


def _parts(walked: Walk, results: int) -> list[int]:
    """Into how many parts the sums over channels might be cut for a small grid to fill the processors: at most three numbers."""
    most = min(MOST_PARTS, walked.processors, walked.blocks // 2, WORKSPACE_ELEMENTS // max(1, results))
    if walked.tiles >= 2 * walked.processors:
        return []

    def rounds(parts: int) -> float:  # and a little for each part, which is written and read
        return cdiv(walked.tiles, walked.processors // parts) / parts + parts / 64

    whole = (n for n in range(2, most + 1) if cdiv(walked.blocks, cdiv(walked.blocks, n)) == n)  # none is empty
    return sorted(whole, key=rounds)[:3]


def _ways(
    axes, batch: int, c_in: int, size, output, element: int, vector: int, last: bool, along_width: bool, dtype: str, dense: bool,
    rounding: bool, processors,
) -> Iterator[tuple[str, str, int, float, int]]:  # fmt: skip
    """How the input may come to the tile, from which layout, by how many elements a load, the cycles of copying it before, and
    from row to row of strips, or 0.  along_width: whether the output's pixels are neighbours in memory."""
    layout = "channels" if last else "width"
    loaded = gcd(vector, c_in, 16 // element) if last else min(vector, 4 // element)
    bulk = last and vector * element >= 16 and (element == 2 or (dtype == "tf32" and rounding))
    planes, rows, columns = apart(axes, size, output)
    # Folds of more phases have no registers for a strip's pixels.
    most = MOST_STRIP_WIDTH if axes[2].stride <= LONG_STRIDE else 0
    as_it_is = bulk and dense and (planes, rows, columns) == size and c_in * element % 16 == 0
    if bulk:
        yield "bulk", layout, loaded, 0.0, 0
        if as_it_is and columns <= most:
            yield "bulk", layout, loaded, 0.0, columns
    if not (bulk and element == 2):
        if vector * element >= 16:
            yield "staged", layout, loaded, 0.0, 0
        yield "threads", layout, loaded, 0.0, 0
    if not dense or dtype == "tf32x3":
        return
    # Several neighbours are loaded or stored at once where a row has whole ones, at the price of the pixels that fill it up.
    steps = {1} if last and not along_width else {1, 2, 4} if axes[2].stride == 1 and output[2] % 4 == 0 else {1, 2}
    strips = sorted({cdiv(columns, step) * step for step in steps})
    for strip in (0, *strips):
        padded = planes * rows * strip if strip else prod(size)
        if (not as_it_is if strip else not bulk) and strip <= most and batch * padded * (c_in + 8) <= MOST_COPIED:
            together = gcd(vector, strip) if strip else vector
            copying = arranging(batch, c_in, prod(size), padded, element, together, last, processors)
            yield "bulk", "channels", 16 // element, copying, strip


def _choices(
    geometry, batch, c_in, c_out, size, dtype: str, source: str, destination: str, vector: int, dense: bool, rounding: bool,
    processors,
) -> Iterator[tuple[float, Shift, bool, int]]:  # fmt: skip
    """What `choose` chooses from: about how many cycles each takes, and what `choose` returns."""
    axes = geometry.axes3
    output = geometry.output_size(size)
    size, output = sizes3(size), sizes3(output)
    element = bytes_of(dtype)
    last = source != "width"
    # The output is new: its strides are multiples of its channels, or of its width.
    dst_layout = "width" if destination == "width" else "channels"
    dst_vector = gcd(c_out, 16 // element) if dst_layout == "channels" else gcd(output[2], 4)
    columns = cdiv(output[2], axes[2].stride)
    volume = axes[0] != Axis(1, 1, 0, 1) or output[0] > 1
    results = batch * prod(output) * c_out
    facts = element * batch * prod(size) * c_in, element * results, output[2]
    ways = _ways(
        axes, batch, c_in, size, output, element, vector, last, dst_layout == "width", dtype, dense, rounding, processors,
    )  # fmt: skip
    for how, layout, loaded, copying, strip in ways:
        along = 1 if layout == "channels" else loaded
        for candidate in candidates(axes, dtype, columns, c_in, c_out, how, along, strip):
            form = *candidate, layout, dst_layout, loaded, dst_vector, volume
            whole = make(axes, dtype, c_in, c_out, *form)
            if whole is None:
                continue
            walked = walk(whole, axes, batch, c_in, c_out, size, output, processors)
            rows = batch * walked.planes * walked.image + whole.halo_rows
            if rows >= MOST_ROWS or max(walked.image, walked.planes) >= MOST_DIVISOR:
                continue
            if strip and rows * strip * whole.joined >= 1 << 30:  # its pixels and phases are counted in 32 bits
                continue
            yield cycles(whole, walked, *facts) + copying, whole, copying > 0, 1
            for count in _parts(walked, results):
                part = make(axes, dtype, cdiv(walked.blocks, count) * whole.kb, c_out, *form, in_parts=True)
                if part is not None:
                    adding = LAUNCH + results * (8 * count + element) / (ADDED * processors)
                    walked_part = walk(part, axes, batch, c_in, c_out, size, output, processors, count)
                    yield cycles(part, walked_part, *facts) + copying + adding, part, copying > 0, count


class Choice(NamedTuple):
    """A tile, whether it takes a copy of the input, into how many parts the sums over channels are cut, the model's cycles, and
    what share of the higher of the two rates that is."""

    tile: Shift
    arranged: bool
    splits: int
    cycles: float
    share: float

    def time(self, weight: int) -> float:
        """About how many nanoseconds a call takes with so many bytes of weight."""
        return self.cycles / CLOCK + BESIDE + weight / 1000 * (AS_IT_LIES if self.tile.raw else PACKED)


@lru_cache(maxsize=4096)
def choose(
    geometry, batch, c_in, c_out, size, dtype: str, source: str, destination: str, vector: int, dense: bool, rounding: bool,
    processors,
) -> Choice | None:  # fmt: skip
    """The choice that is quickest by the model, or None where none fits.

    dense: whether the input can be copied; rounding: whether bulk copies can round."""

    def cost(choice: tuple[float, Shift, bool, int]) -> float:
        took, tile, *_ = choice
        return took * (HALF_THE_CODE if tile.work == "together" else 1.0)

    choices = _choices(
        geometry, batch, c_in, c_out, size, dtype, source, destination, vector, dense, rounding, processors
    )
    best = min(choices, key=cost, default=None)
    if best is None:
        return None
    took, tile, copied, count = best
    element, output = bytes_of(dtype), geometry.output_size(size)
    rows = max(c_out, 16)  # the portable kernels' tiles have no fewer
    products = PRODUCTS[tile.parts] * batch * prod(output) * c_in * rows * geometry.taps / prod(geometry.stride)
    moved = element * batch * (prod(size) * c_in + prod(output) * c_out)
    least = max(products / MULTIPLY_ADDS[element], moved / MEMORY) / processors
    return Choice(tile, copied, count, took, least / took)
