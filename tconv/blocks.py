"""The block kernel's tile (kernels/blocks.py): what it is told at compile time, and which one a problem takes.

Pure integers, from a layer's geometry; neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from .configs import Tile, cdiv
from .geometry import Geometry, sizes3
from .shift import SHARED, bytes_of

ROW = 128  # bytes of a row of shared memory, the most that a bulk copy's swizzle takes
PACKED_ROWS = 16  # of a packed weight, at TF32
BOXES = (128, 64, 32, 16)  # pixels
LEAST_LAST = {2: 32, 4: 16}  # of those in channels_last, by bytes of an element
TILES = ((64, 128), (128, 64), (64, 64))  # pixels and columns, as they were quickest (docs/kernels.md)
LEAST_STAGES, MOST_STAGES = 4, 6
MOST_PIXELS = 1 << 30  # of a batch, and rows of its output: kernels.blocks counts them in 32 bits
# How much more pixels, those beyond the end of a line included, may be multiplied than there are.
MOST_PADDED = 1.1
# The input is read once for each tile of columns, mostly from the L2: at most so many times the bytes that input and output have, by
# layout and bytes of an element.
MOST_READ = {("width", 2): 3.5, ("channels", 2): 2.5, ("width", 4): 1.8, ("channels", 4): 1.8}


@dataclass(frozen=True)
class Blocks(Tile):
    """A tile of the block kernel: of `pixels` input pixels `columns` outputs each, by four warps.

    A line is a row of pixels, or where rows are shorter than a box and the input is contiguous a whole image."""

    layout: str  # of input and output: "width" or "channels"
    dtype: str  # "fp16", "bf16" or "tf32"
    size: int  # bytes of an element
    stride: tuple[int, int, int]  # and kernel
    pixels: int
    box: int  # pixels of a line that one bulk copy brings
    columns: int  # output channels and places in the block, those innermost that lie side by side in the output
    chunk: int  # elements side by side that one bulk store takes
    kb: int  # input channels of a stage
    stages: int  # of each of the two groups of four warps
    slots: int  # blocks of weights, [kb, columns] each

    @property
    def unit(self) -> int:
        """Pixels of a bulk store."""
        return self.chunk // self.stride[2] if self.layout == "width" else self.box

    @property
    def across(self) -> int:
        """Bulk copies of a tile's pixels."""
        return self.pixels // self.box

    @property
    def units(self) -> int:
        """Bulk stores of a tile's pixels."""
        return self.pixels // self.unit

    @property
    def taps(self) -> int:
        return prod(self.stride)

    @property
    def channels(self) -> int:
        """Output channels of a tile whose pixels are neighbours."""
        return self.columns // self.taps

    @property
    def of_copy(self) -> int:
        """Columns of a bulk copy of weights: at TF32 in "width" those of one place in the block."""
        if self.layout == "channels":
            return self.chunk
        return self.channels if self.size == 4 else ROW // self.size

    def describe(self) -> str:
        """In words."""
        return (
            f"{self.pixels} pixels in rows of {self.box}, {self.columns} columns, {self.kb} channels, {self.stages} stages, "
            "four warps a tile, bulk copies and bulk stores"
        )


@dataclass(frozen=True)
class Walk:
    """How a grid of CTAs walks over a problem's tiles: what the kernel is told at run time."""

    tiles: int  # of pixels
    columns: int  # tiles
    across: int  # chunks of a row of the block, where channels are neighbours
    lines: int  # of an image
    length: int  # of a line, in pixels
    boxes: int  # of a line
    wrap: int  # pixels of a row, where a line has several of them; a number beyond all where not
    grid: int


def walk(tile: Blocks, batch: int, c_out: int, size, processors: int) -> Walk:
    depth, height, width = size
    whole = width < tile.box and tile.layout == "width"
    lines, length = (1, prod(size)) if whole else (depth * height, width)
    boxes = cdiv(length, tile.box)
    tiles = cdiv(batch * lines * boxes, tile.across)
    if tile.layout == "width":
        across, columns = 1, cdiv(c_out, tile.channels)
    else:
        across = cdiv(tile.stride[2] * c_out, tile.chunk)
        columns = cdiv(tile.stride[0] * tile.stride[1] * across, tile.columns // tile.chunk)
    grid = columns * max(1, min(processors // columns, cdiv(tiles, 2)))
    return Walk(tiles, columns, across, lines, length, boxes, width if whole else MOST_PIXELS, grid)


def takes(geometry: Geometry) -> bool:
    """Whether each input pixel has a block of outputs of its own, and the blocks fill the output."""
    axes = geometry.axes
    alike = all(a.kernel == a.stride and not a.padding and (a.dilation == 1 or a.kernel == 1) for a in axes)
    return alike and not any(geometry.output_padding) and geometry.groups == 1


def joined(stride, size) -> tuple[int, ...]:
    """The sizes of planes, rows and pixels as a tile sees them: without strides all pixels of an image are one row."""
    return sizes3(size) if prod(stride) > 1 else (1, 1, prod(size))


def _candidates(stride, c_in: int, c_out: int, size, dtype: str, layout: str) -> Iterator[Blocks]:
    """The tiles that fit, the quickest first."""
    element, width = bytes_of(dtype), size[2]
    line, taps = ROW // element, prod(stride)
    if layout == "width" and any(n & (n - 1) for n in stride):
        return  # the accumulators are put in the output's order by powers of two
    # Bulk copies ask for strides of whole 16 bytes; and a packed weight has whole 16 rows a place in the block.
    strides = (prod(size), width * stride[2], c_out * taps) if layout == "width" else (c_in, c_out)
    if any(n * element % 16 for n in strides) or (layout == "channels" and element == 4 and c_out % PACKED_ROWS):
        return
    for pixels, columns in TILES:
        if columns > line and c_out * taps < columns // 2:
            continue
        for box in BOXES:
            if box > (min(pixels, line) if layout == "width" else pixels):
                continue
            if layout == "width":
                # Rows shorter than a box follow each other in it, and a store takes pixels of one.
                chunk = min(line, box * stride[2])
                while width < box and chunk > 1 and width * stride[2] % chunk:
                    chunk //= 2
                # A store begins with eight rows that are swizzled together.
                fits = chunk % stride[2] == 0 and columns // taps * (stride[1] if element == 2 else 1) >= 8
                # A bulk copy begins at a multiple of 16 bytes, also in its tensor.
                fits = fits and (width < box or width * element % 16 == 0)
                padded = cdiv(prod(size), box) * box if width < box else cdiv(width, box) * box * prod(size[:2])
            else:
                row = stride[2] * c_out
                chunk = next((n for n in (line, line // 2, line // 4) if row % n == 0), line)
                fits = width >= box >= LEAST_LAST[element]
                padded = cdiv(width, box) * box * prod(size[:2])
            if not fits or chunk * element < 32 or padded > MOST_PADDED * prod(size):
                continue
            blocks = cdiv(c_in, line)
            fixed = (2 * pixels + blocks * line) * columns * element
            stages = min(MOST_STAGES, (SHARED - fixed) // (2 * pixels * line * element))
            if stages >= LEAST_STAGES:
                yield Blocks(layout, dtype, element, stride, pixels, box, columns, chunk, line, stages, blocks)
            break


@lru_cache(maxsize=4096)
def choose(
    stride, batch: int, c_in: int, c_out: int, input_size, dtype: str, layout: str, processors: int
) -> Blocks | None:
    """The first tile that fills the processors, or the one that fills most of them, or None where none fits."""
    size, best = joined(stride, input_size), None
    for tile in _candidates(stride, c_in, c_out, size, dtype, layout):
        walked = walk(tile, batch, c_out, size, processors)
        if walked.columns > processors or walked.columns * c_in > MOST_READ[layout, tile.size] * (
            c_in + c_out * prod(stride)
        ):
            continue
        if best is None or walked.grid > best[0]:
            best = walked.grid, tile
        if walked.grid >= processors // walked.columns * walked.columns:
            break
    return best[1] if best else None
