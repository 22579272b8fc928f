"""The shift kernel's tile (kernels/shift.py): what it is told at compile time, and which one a problem takes.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from .configs import Target, cdiv, power_of_two
from .geometry import Axis

SHARED = 232448 - 2048  # bytes of shared memory a block may have on sm_90, less the barriers
CO = 64  # output channels of a tile
TRITON = ((3, 6), (3, 7), (3, 8), (3, 9))  # the releases whose Gluon the kernel was compiled with and run on
MOST_TAPS = 64  # they are unrolled
MOST_PHASES = 4  # along the height: each has code of its own


@dataclass(frozen=True)
class Shift:
    """A tile of the shift kernel, in the form that it takes."""

    # By phase along the height: (phase along the width, weight tap, shift in pixels) of each tap.
    taps: tuple[tuple[tuple[int, int, int], ...], ...]
    taps_all: int
    # First input row that output row 0 reads: of each phase along the height, or of all where one tile does them all.
    low: tuple[int, ...]
    low_w: int
    stride_h: int
    stride_w: int
    rows: int  # of a tile, without halo
    halo_rows: int
    box: int  # pixels of a row in shared memory, halo included
    useful: int  # those of which outputs exist
    pixels: int  # of one consumer
    shared: bool  # both consumers multiply the same tile's pixels; otherwise every other tile is theirs
    size: int  # bytes of an element
    dtype: str  # "fp16", "bf16" or "fp32"
    kb: int  # channels of a stage
    stages: int
    pitch: int  # pixels from stage to stage
    ring: int  # pixels of all stages and slack
    slots: int  # blocks of weights in shared memory
    resident: bool  # they are all of a channel tile's weights
    chunk: int  # pixels that pass through the output buffer at once
    src_layout: str
    dst_layout: str
    by_tma: bool
    vector: int  # neighbouring pixels a thread loads
    dst_vector: int
    bring: int  # pixels that the producers' threads load at once
    registers: tuple[int, int]  # a thread, of the second consumer and of who brings the input
    producers: int = 4  # warps

    @property
    def joined(self) -> int:
        """Phases along the width that are interleaved before the store."""
        return self.stride_w if self.dst_layout == "width" else 1

    @property
    def brings(self) -> int:
        return cdiv(self.halo_rows * self.box, self.bring)

    @property
    def one_phase(self) -> bool:
        """Whether a tile does one phase along the height (where there is one phase, that is all of them)."""
        return len(self.low) == self.stride_h

    @property
    def all_phases(self) -> bool:
        """Whether a tile does all phases along the height, from one reading of its input."""
        return len(self.low) == 1

    def describe(self) -> str:
        """In words; not __str__, which Triton takes for the key of its cache."""
        return (
            f"{self.rows} rows of {self.useful} + {self.box - self.useful} pixels, {self.kb} channels, "
            f"{self.stages} stages, {self.slots} blocks of weights{' (all)' if self.resident else ''}, "
            f"{'one tile' if self.shared else 'a tile each'} for two groups of warps"
        )


@lru_cache(maxsize=4096)
def make(
    axes: tuple[Axis, Axis],
    dtype: str,
    c_in: int,
    box: int,
    pixels: int,
    kb: int,
    shared: bool,
    all_phases: bool,
    src_layout: str,
    dst_layout: str,
    src_vector: int,
    dst_vector: int,
) -> Shift | None:
    """The tile with `box` pixels a row, or None where it does not fit."""
    height, width = axes
    size = 4 if dtype == "fp32" else 2
    by_h = [height.taps(a) for a in range(height.stride)]
    by_w = [width.taps(b) for b in range(width.stride)]
    rows = pixels * (2 if shared else 1) // box
    blocks = cdiv(c_in, kb)
    columns = [d for taps in by_w for _, d in taps]
    low_w, high_w = min(columns), max(columns)
    by_tma = src_layout == "channels" and size == 2
    bring = 1 if by_tma else 128 if size == 4 else 64  # more would spill
    align = src_vector if src_layout == "width" else 1
    low_w -= low_w % align
    useful = box - (high_w - low_w)
    step = max(align, cdiv(dst_vector, width.stride)) if dst_layout == "width" else align
    useful -= useful % step
    if not rows or useful < 1 or box % align:
        return None
    block = 64 * kb * size
    taps_all = height.kernel * width.kernel
    joined = width.stride if dst_layout == "width" else 1
    most = min(pixels, 16384 // (64 * joined * size))
    lows = [min((d for _, d in taps), default=0) for taps in by_h]
    if all_phases:
        lows = [min(lows)] * height.stride
    span = max((d - lo for taps, lo in zip(by_h, lows) for _, d in taps), default=0)
    taps = tuple(
        tuple(
            (b, kh * width.kernel + kw, (dh - lows[a]) * box + dw - low_w)
            for kh, dh in by_h[a]
            for b in range(width.stride)
            for kw, dw in by_w[b]
        )
        for a in range(height.stride)
    )
    halo_rows = rows + span
    unit = max(pixels, bring)
    pitch = cdiv(halo_rows * box, unit) * unit
    furthest = max((s for row in taps for _, _, s in row), default=0) + pixels * (2 if shared else 1)
    slack = cdiv(max(0, furthest - pitch), 8) * 8 * kb * size
    stage = pitch * kb * size
    # All phases release a tile's blocks with the last of them, and with a tile each, blocks of two tiles are under way:
    # stages for two tiles, or for one block more, without which the ring would stand still.
    held = all_phases and (height.stride > 1 or not shared)
    wanted = (2 * blocks, blocks + 1) if held else (2,)
    # All weights stay in shared memory where they fit.
    for least, resident, chunk in product(wanted, (True, False), (most, most // 2)):
        if (resident and not all_phases) or (not resident and not shared):
            continue  # a tile a phase streams its weights, a tile each does not
        buffers = 2 * 64 * chunk * joined * size
        slots = taps_all * blocks
        if not resident:
            slots = 8 if buffers + slack + least * stage + 8 * block <= SHARED else 4
        stages = (SHARED - buffers - slack - slots * block) // stage
        if stages >= least:
            break
    else:
        return None
    stages = min(stages, max(4, wanted[0]))
    low = tuple(lows[:1] if all_phases else lows)
    registers = (240, 24) if by_tma else (192, 128) if size == 4 else (184, 136)  # so that fewest are spilt
    return Shift(
        taps, taps_all, low, low_w, height.stride, width.stride, rows, halo_rows, box, useful, pixels, shared, size,
        dtype, kb, stages, pitch, stages * pitch + slack // (kb * size), slots, resident, chunk, src_layout, dst_layout,
        by_tma, src_vector, dst_vector, bring, registers,
    )  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """How a grid of CTAs walks over a problem's tiles: what the kernel is told at run time."""

    image: int  # rows from image to image, zero rows between them included
    blocks: int  # of channels
    tiles_co: int
    tiles_w: int
    tiles: int
    grid: int
    width: int  # of the input


def walk(tile: Shift, axes, batch, c_in, c_out, size, output, processors) -> Walk:
    """Images are stacked along the height, so far apart that a tap never reaches from one to the next."""
    height = axes[0]
    rows_out, columns_out = cdiv(output[0], tile.stride_h), cdiv(output[1], tile.stride_w)
    reach = [d for a in range(height.stride) for _, d in height.taps(a)]
    image = max(rows_out, size[0] - min(0, *tile.low), rows_out + max(0, *reach))
    blocks, tiles_co, tiles_w = cdiv(c_in, tile.kb), cdiv(c_out, CO), cdiv(columns_out, tile.useful)
    tiles = tiles_co * len(tile.low) * tiles_w * cdiv(batch * image, tile.rows)
    grid = min(tiles, processors)
    if tile.resident:  # a CTA keeps the weights of one channel tile
        grid = max(tiles_co, grid // tiles_co * tiles_co)
    return Walk(image, blocks, tiles_co, tiles_w, tiles, grid, size[1])


# Rates of one SM of an H200 in a cycle, for comparing tiles with each other: multiply-adds, and bytes through registers,
# by TMA, of weights and to the output; and cycles that a block of channels and a tap of it cost beside them.
MULTIPLY_ADDS = {2: 1760, 4: 880}
THREADS, TMA, WEIGHTS, OUTPUT = 12, 40, 40, 14
BLOCK, TAP = 150, 25
COPY = 60  # cycles of a bulk copy beside its bytes: one a row
LINE = 128  # bytes: shorter runs of neighbouring addresses waste part of a memory transaction


def cycles(tile: Shift, walked: Walk) -> float:
    """About how many cycles the busiest SM takes."""
    phases = tile.stride_h if tile.all_phases else 1
    taps = tile.taps_all * phases / tile.stride_h
    pixels = tile.pixels * (2 if tile.shared else 1)
    channels = walked.blocks * tile.kb
    rate = MULTIPLY_ADDS[tile.size] * (0.75 if tile.pixels == 64 else 1.0)  # operand A's share of shared memory's rate
    multiply = pixels * CO * channels * taps / rate + walked.blocks * phases * (BLOCK + TAP * taps / phases)
    run = min(1.0, tile.useful * tile.joined * tile.size / LINE) if tile.dst_layout == "width" else 1.0
    store = pixels * CO * phases * tile.stride_w * tile.size / OUTPUT / run
    run = min(1.0, min(tile.box, walked.width) * tile.size / LINE) if tile.src_layout == "width" else 1.0
    bring = tile.halo_rows * tile.box * channels * tile.size / (TMA if tile.by_tma else THREADS * run)
    if tile.by_tma:
        bring += COPY * tile.halo_rows * walked.blocks
    weights = 0 if tile.resident else taps * channels * CO * tile.size / WEIGHTS
    # With a tile each, one group of warps multiplies while the other stores.
    step = max(multiply + store, bring, weights) if tile.shared else max(multiply, (multiply + store) / 2, bring)
    # What is released with the last phase alone leaves no stages to bring the next tile meanwhile; bulk copies make up
    # for it, threads did not: k4 s2 at TF32 took 2.5 ms where 1.0 is had with a tile a phase.
    if phases > 1 and not tile.by_tma and tile.stages < 2 * walked.blocks:
        step = multiply + store + bring
    step += 0.1 * bring  # of two as quick, the one that reads less
    return cdiv(walked.tiles, walked.grid) * step + store + bring / walked.blocks


def candidates(axes, dtype: str, columns_out: int, c_in: int, by_tma: bool, vector: int) -> Iterator[tuple]:
    """(box, pixels, kb, shared, all_phases) worth trying."""
    height, width = axes
    offsets = [d for b in range(width.stride) for _, d in width.taps(b)]
    halo = max(offsets) - min(offsets)
    exact = cdiv(columns_out + halo + (vector if vector > 1 else 0), vector) * vector
    boxes = {8, 16, 32, 64, 128, 256}
    if not by_tma and exact <= 64:
        boxes.add(exact)
    kb = power_of_two(c_in, 16, 32 if dtype == "fp32" else 64)  # rows of 128 bytes
    # The accumulators of all phases along the width have at most 256 columns, and 128 each where the producers' threads
    # leave a consumer 192 registers.
    for pixels in (64, 128, 256):
        for shared, all_phases in ((True, True), (True, False), (False, True)):
            fits = pixels * width.stride <= 256 and (by_tma or pixels <= 128) and (all_phases or height.stride > 1)
            # Of 16-bit tiles that pass through registers, one for both consumers was 1.25 to 1.4 times as fast.
            if fits and (shared or by_tma or dtype == "fp32"):
                for box in sorted(boxes):
                    if box <= pixels * (2 if shared else 1):
                        yield box, pixels, kb, shared, all_phases


def refuse(geometry, c_in, c_out, large, precision, source, destination, vector, target: Target) -> str:
    """Why the shift kernel does not take a problem, or ""."""
    axes = geometry.axes3
    for bad, why in (
        (target.backend != "cuda" or target.arch != 90, "the shift kernel is for sm_90"),
        (
            target.triton not in TRITON,
            f"the shift kernel was not tried with Triton {'.'.join(map(str, target.triton))}",
        ),
        (geometry.ndim == 3, "the shift kernel has no depth yet"),
        (geometry.groups > 1, "the shift kernel has no groups yet"),
        (precision not in ("half", "tf32"), f"the shift kernel has no {precision} yet"),
        (axes[2].stride > 2, "the shift kernel has strides up to 2 along the width"),
        (axes[1].stride > MOST_PHASES, f"the shift kernel has strides up to {MOST_PHASES} along the height"),
        (geometry.taps > MOST_TAPS, f"the shift kernel has up to {MOST_TAPS} taps"),
        (large, "the shift kernel has 32-bit offsets"),
        (c_in < 16 or c_out <= 16, "few channels"),
        (source not in ("width", "vectors") or destination not in ("width", "vectors"), "of the tensors' strides"),
        (source == "vectors" and vector < 8, "the input is not aligned to 16 bytes"),
    ):
        if bad:
            return why
    return ""


# Below this share of the tensor core's rate by the model above, the portable kernels fill the GPU better.
LEAST_SHARE = 0.05


@lru_cache(maxsize=4096)
def choose(
    geometry, batch, c_in, c_out, size, dtype: str, source: str, destination: str, vector: int, processors
) -> Shift | None:
    """The tile that is quickest by the model, or None where none fits or fills the GPU."""
    axes = geometry.axes3[1:]
    size = (1,) * (2 - len(size)) + tuple(size)
    output = geometry.output_size(size[-geometry.ndim :])
    output = (1,) * (2 - len(output)) + output
    by_tma = source == "vectors" and dtype != "fp32"
    src_vector = min(vector, 2) if source == "width" and dtype != "fp32" else 1
    dst_vector = 4 if output[1] % 4 == 0 else 1
    layouts = {"width": "width", "vectors": "channels"}
    best = None
    for candidate in candidates(axes, dtype, cdiv(output[1], axes[1].stride), c_in, by_tma, src_vector):
        tile = make(axes, dtype, c_in, *candidate, layouts[source], layouts[destination], src_vector, dst_vector)
        if tile is None:
            continue
        cost = cycles(tile, walk(tile, axes, batch, c_in, c_out, size, output, processors))
        if best is None or cost < best[0]:
            best = cost, tile
    if best is None:
        return None
    work = batch * prod(output) * c_in * c_out * geometry.taps / (axes[0].stride * axes[1].stride)
    share = work / MULTIPLY_ADDS[best[1].size] / processors / best[0]
    return best[1] if share >= LEAST_SHARE else None
