"""The block kernel for Hopper (sm_90): kernel = stride without padding (1 included), where each input pixel makes a block of outputs of its own.

One matrix product, [pixels, input channels] x [input channels, columns]; a column is an output channel at a place in the block.  Bulk
copies bring the input as it lies, and bulk stores take the outputs from shared memory, where the accumulators are written once, in
the output's order.  A CTA keeps the weights of its columns; two groups of four warps, each with stages of its own, multiply or write
at different times.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import async_load, async_store, await_launches, barrier, element, reinterpret, round_to_tf32, swizzled


def descriptor_layouts(p):
    """Of input, weight and output."""
    if p.layout == "width":
        x, y = swizzled(p.box, p.size, 3), swizzled(p.chunk, p.size, 4)
    else:
        x, y = swizzled(p.kb, p.size, 2), swizzled(p.chunk, p.size, 3)
    w = swizzled(p.kb, 4, 2) if p.size == 4 else swizzled(p.of_copy, 2, 2 if p.layout == "width" else 3)
    return x, w, y


@triton.constexpr_function
def _product(p):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.columns, 32 // p.size])


@gluon.jit
def _line(box, sizes, p: gl.constexpr):
    """Of a box of pixels: its image, its line in that, and its first pixel in that."""
    boxes, lines = sizes[2], sizes[3]
    line = box // boxes
    n = line // lines
    return n, line - n * lines, (box - line * boxes) * p.box


@gluon.jit
def _bring_weights(w, weights, full, column, sizes, p: gl.constexpr):
    """All weights of the CTA's columns, [block, input channels, columns]; at TF32 packed ones, [block, columns, input channels]."""
    blocks, across, rows = sizes[1], sizes[8], sizes[10]
    PARTS: gl.constexpr = p.columns // p.of_copy
    if p.size == 4:
        await_launches(blocks)
    mbarrier.expect(full.index(0), p.slots * p.kb * p.columns * p.size)
    for b in range(0, blocks):
        for c in gl.static_range(PARTS):
            if p.size == 4:
                to = reinterpret(weights, gl.float32, [p.slots * PARTS, p.of_copy, p.kb], swizzled(p.kb, 4))
                if p.layout == "width":
                    row = c * rows + column * p.of_copy
                else:
                    row = (column * PARTS + c) * p.of_copy
                async_load(w, [row, b * p.kb], full.index(0), to.index(b * PARTS + c))
            elif p.layout == "width":
                to = reinterpret(weights, element(p), [p.slots * PARTS, p.kb, p.of_copy], swizzled(p.of_copy, 2))
                async_load(w, [b * p.kb, column * p.columns + c * p.of_copy], full.index(0), to.index(b * PARTS + c))
            else:
                to = reinterpret(weights, element(p), [p.slots * PARTS, p.kb, 1, p.of_copy], swizzled(p.of_copy, 2, 3))
                chunk = column * PARTS + c
                at = [b * p.kb, chunk // across, chunk % across * p.of_copy]
                async_load(w, at, full.index(0), to.index(b * PARTS + c))


@gluon.jit
def _bring(x, w, ring, weights, full, empty, w_full, sizes, GROUP: gl.constexpr, p: gl.constexpr):
    tiles, blocks, lines, length, columns = sizes[0], sizes[1], sizes[3], sizes[4], sizes[11]
    if GROUP == 0:
        _bring_weights(w, weights, w_full, gl.program_id(0) % columns, sizes, p)
    i = 0
    for t in range(gl.program_id(0) // columns * 2 + GROUP, tiles, gl.num_programs(0) // columns * 2):
        for b in range(0, blocks):
            s = GROUP * p.stages + i % p.stages
            mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)
            mbarrier.expect(full.index(s), p.pixels * p.kb * p.size)
            for j in gl.static_range(gl.constexpr(p.across)):
                n, line, at = _line(t * p.across + j, sizes, p)
                if p.layout == "width":
                    to = reinterpret(
                        ring, element(p), [2 * p.stages * p.across, 1, p.kb, p.box], swizzled(p.box, p.size, 3)
                    )
                    async_load(x, [n, b * p.kb, line * length + at], full.index(s), to.index(s * p.across + j))
                else:
                    to = reinterpret(ring, element(p), [2 * p.stages * p.across, p.box, p.kb], swizzled(p.kb, p.size))
                    async_load(
                        x, [(n * lines + line) * length + at, b * p.kb], full.index(s), to.index(s * p.across + j)
                    )
            i += 1


@gluon.jit
def _store(v, y, buffer, tile, column, sizes, p: gl.constexpr):
    """Write a tile of accumulators [pixels, columns]."""
    height, wrap, depth, across = sizes[5], sizes[6], sizes[7], sizes[8]
    D: gl.constexpr = p.stride[0]
    H: gl.constexpr = p.stride[1]
    W: gl.constexpr = p.stride[2]
    OF_BOX: gl.constexpr = p.box // p.unit
    CHUNKS: gl.constexpr = p.columns // p.chunk
    v = v.to(element(p))
    if p.layout == "channels":
        v = v.reshape([p.pixels, CHUNKS, p.chunk]).permute((1, 0, 2)).reshape([CHUNKS * p.pixels, p.chunk])
    else:
        if p.size == 4:
            v = v.reshape([p.units, p.unit, D, H, W, p.channels]).permute((0, 2, 5, 3, 1, 4))
        else:
            v = v.reshape([p.units, p.unit, p.channels, D, H, W]).permute((0, 3, 2, 4, 1, 5))
        v = v.reshape([p.units * D * p.channels * H, p.chunk])
    tma.store_wait(0)
    barrier()  # the last tile has been read from the buffer
    buffer.store(v)
    fence_async_shared()
    for i in gl.static_range(gl.constexpr(p.units)):
        n, line, at = _line(tile * p.across + i // OF_BOX, sizes, p)
        at += i % OF_BOX * p.unit
        line += at // wrap
        at = at % wrap
        d = line // height
        h = line - d * height
        if p.layout == "width":
            out = reinterpret(
                buffer, element(p), [p.units * D, 1, p.channels, H, p.chunk], swizzled(p.chunk, p.size, 4)
            )
            for z in gl.static_range(D):
                row = ((d * D + z) * height + h) * H
                async_store(y, [n, column * p.channels, row, at * W], out.index(i * D + z))
        else:
            out = reinterpret(buffer, element(p), [CHUNKS * p.units, 1, p.unit, p.chunk], swizzled(p.chunk, p.size, 3))
            for c in gl.static_range(CHUNKS):
                chunk = column * CHUNKS + c
                z = chunk // across  # the row in the block
                row = (((n * depth + d) * D + z // H) * height + h) * H + z % H
                row = gl.where(z < D * H, row, 1 << 30)  # nowhere
                async_store(y, [row, at, chunk % across * p.chunk], out.index(c * p.units + i))


@gluon.jit
def _multiply(y, bias, ring, weights, buffers, full, empty, w_full, sizes, GROUP: gl.constexpr, p: gl.constexpr):
    tiles, blocks, across, c_out, columns, has_bias = sizes[0], sizes[1], sizes[8], sizes[9], sizes[11], sizes[12]
    layout: gl.constexpr = _product(p)
    PIXELS: gl.constexpr = p.pixels
    COLUMNS: gl.constexpr = p.columns
    buffer = buffers.index(GROUP)
    column = gl.program_id(0) % columns
    k = gl.arange(0, p.columns, layout=gl.SliceLayout(0, layout))
    if p.layout == "channels":
        c = (column * p.columns + k) % (across * p.chunk) % c_out
    elif p.size == 4:
        c = column * p.channels + k % p.channels
    else:
        c = column * p.channels + k // p.taps
    of_column = gl.load(bias + c, mask=(c < c_out) & (has_bias != 0), other=0.0)
    mbarrier.wait(w_full.index(0), 0)
    i = 0
    for t in range(gl.program_id(0) // columns * 2 + GROUP, tiles, gl.num_programs(0) // columns * 2):
        acc = gl.zeros([PIXELS, COLUMNS], gl.float32, layout)
        for b in range(0, blocks):
            s = GROUP * p.stages + i % p.stages
            mbarrier.wait(full.index(s), i // p.stages & 1)
            if p.layout == "width":
                a = ring.index(s).permute((1, 0))
            else:
                a = ring.index(s)
            if p.size == 4:  # rounded on the way: wgmma would truncate
                value = round_to_tf32(a.load(gl.DotOperandLayout(0, layout, 1)))
                barrier()  # everyone has read the stage
                mbarrier.arrive(empty.index(s), count=1)
                acc = warpgroup_mma(value, weights.index(b).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            else:
                acc = warpgroup_mma(a, weights.index(b), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                before = GROUP * p.stages + (i + p.stages - 1) % p.stages
                mbarrier.arrive(empty.index(before), count=1, pred=b > 0)
            i += 1
        if p.size == 2:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(GROUP * p.stages + (i + p.stages - 1) % p.stages), count=1)
        _store(acc + of_column.to(gl.float32)[None, :], y, buffer, t, column, sizes, p)
    tma.store_wait(0)


# The run-time scalars, in the order in which the parts of the kernel find them in `sizes`.
SCALARS = "tiles blocks boxes lines length height wrap depth across c_out rows columns has_bias".split()


def _name(specialization):
    p = specialization.constants["p"]
    return f"tconv_blocks_{p.layout}_{p.dtype}_{p.pixels}of{p.box}x{p.kb}x{p.columns}"


@gluon.jit(repr=_name, do_not_specialize=SCALARS)
def blocks_forward(
    x, w, bias, y, tiles, blocks, boxes, lines, length, height, wrap, depth, across, c_out, rows, columns, has_bias, p: gl.constexpr
):  # fmt: skip
    """y = conv_transpose3d(x, w) + bias of kernel = stride; `p` is a tconv.blocks.Blocks.  x [image, channel, pixel] or [pixel, channel],
    w [channel, column], [channel, row of the block, column in it] or at TF32 packed by pack_weight ([place and output channel,
    channel], `rows` of a place), y [image, channel, row, pixel] or [row, input pixel, place in the row and channel].

    tiles, columns: how many of pixels, and of columns.  blocks: of p.kb input channels.  A line has `length` pixels in so many boxes, an
    image so many lines, `depth` planes of `height` rows; where a line is an image, `wrap` is the width.  across: chunks of a row
    of the block, where channels are neighbours."""
    sizes = (tiles, blocks, boxes, lines, length, height, wrap, depth, across, c_out, rows, columns, has_bias)
    if p.layout == "width":
        ring = gl.allocate_shared_memory(element(p), [p.stages * 2, p.kb, p.pixels], swizzled(p.box, p.size))
    else:
        ring = gl.allocate_shared_memory(element(p), [p.stages * 2, p.pixels, p.kb], swizzled(p.kb, p.size))
    if p.size == 4:
        weights = gl.allocate_shared_memory(gl.float32, [p.slots, p.columns, p.kb], swizzled(p.kb, 4))
    else:
        weights = gl.allocate_shared_memory(element(p), [p.slots, p.kb, p.columns], swizzled(p.of_copy, p.size))
    rows_of_buffer: gl.constexpr = p.pixels * p.columns // p.chunk
    buffers = gl.allocate_shared_memory(element(p), [2, rows_of_buffer, p.chunk], swizzled(p.chunk, p.size))
    full = gl.allocate_shared_memory(gl.int64, [2 * p.stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * p.stages, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(gl.constexpr(2 * p.stages)):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    mbarrier.init(w_full.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (y, bias, ring, weights, buffers, full, empty, w_full, sizes, 0, p)),
            (_multiply, (y, bias, ring, weights, buffers, full, empty, w_full, sizes, 1, p)),
            (_bring, (x, w, ring, weights, full, empty, w_full, sizes, 0, p)),
            (_bring, (x, w, ring, weights, full, empty, w_full, sizes, 1, p)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
