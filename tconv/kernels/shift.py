"""The shift kernel for Hopper (sm_90): implicit GEMM that reads a tile of the input once for many taps.

A tile of input pixels with its halo lies in swizzled shared memory, one pixel a row of KB channels.  Every tap's wgmma
takes that same tile, seen some pixels further on, as its operand B; operand A is the tap's weight.  One CTA an SM walks
over tiles; eight warps multiply (together, half of a tile's pixels each, or every other tile), others bring the operands.

M = 64 output channels (or fewer, times the phases along the width that are folded into them), N = pixels of one phase,
K = input channels times the phase's taps; taps along the depth, and where they are many or differ from phase to phase
those along the height, are readings of their own (docs/kernels.md).
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import (
    M,
    async_load,
    await_launches,
    barrier,
    element,
    opaque_zero,
    reinterpret,
    ring_memory,
    ring_rows,
    ring_view,
    round_to_tf32,
    swizzled,
)


def descriptor_layouts(p):
    """Of the blocks of weights, and of the input that a bulk copy brings."""
    rank = 2 if p.strip else 5 if p.volume else 4
    pixels_inside = p.how == "staged" and p.src_layout == "width"
    return swizzled(M if p.raw else p.kb, p.size, 3 if p.raw else 2), swizzled(
        p.bring if pixels_inside else p.kb, p.size, rank
    )


@triton.constexpr_function
def _accumulator(p):
    return gl.NVMMADistributedLayout([3, 0], [4, p.groups], [16, p.pixels // p.groups, 32 // p.size])


@triton.constexpr_function
def _producer_layout(p):
    """Of a chunk [pixels, channels] in the registers of the warps that bring it: 16 bytes of channels a thread."""
    vector = 16 // p.size
    across = p.kb // vector  # threads along the channels
    if p.src_layout == "channels":
        return gl.BlockedLayout([1, vector], [32 // across, across], [p.producers, 1], [1, 0])
    lanes = min(32, p.bring // p.vector)
    along = min(p.producers, max(1, across * lanes // 32))
    return gl.BlockedLayout([p.vector, vector], [lanes, 32 // lanes], [p.producers // along, along], [0, 1])


@triton.constexpr_function
def _store_layout(p):
    """Of a chunk on its way from shared memory to the output: along the pixels (width) or the channels."""
    warps = 4 * p.groups
    if p.dst_layout == "channels":
        # Of narrow stores a thread has several of a pixel's channels, and fewer pixels to find.
        lanes = min(p.dst_channels // p.dst_vector, 32 if p.dst_vector * p.dst_size == 16 else 8)
        return gl.BlockedLayout([1, p.dst_vector], [32 // lanes, lanes], [warps, 1], [1, 0])
    lanes = min(32, p.chunk * p.joined // p.dst_vector)
    down = min(warps, p.dst_channels)
    return gl.BlockedLayout([1, p.dst_vector], [32 // lanes, lanes], [down, warps // down], [1, 0])


@triton.constexpr_function
def _pixel_buffer(p):
    """Of the output's chunks along the pixels; rows are swizzled by the eight."""
    if p.fold.channels < 8:
        return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return swizzled(p.chunk * p.joined, p.dst_size)


# Where the scalars of the depth, the inverses of `image` and `planes`, a part's first block, `copied` and those of a round are among
# them.
PLANES, D_IN, X_D, D_OUT, Y_D, BY_IMAGE, BY_PLANES, FIRST_BLOCK, COPIED, OF_ROUND, SPIN = (
    gl.constexpr(i) for i in range(21, 32)
)


@triton.constexpr_function
def _stored(p):
    """What the output has: the input's dtype, or fp32 for sums of some of the channels."""
    return gl.float32 if p.partial else element(p)


@gluon.jit
def _put(v, ring, row, p: gl.constexpr):
    """A chunk of pixels into the ring from `row` on; at tf32x3 as two TF32 values, in two places (common.split_tf32)."""
    to = ring_rows(ring, row, p.bring, p)
    if p.parts == 2:
        high = round_to_tf32(v)
        finite = gl.abs(high) < float("inf")
        high = gl.where(finite, high, 0.0)
        to.store(high)
        ring_rows(ring, row + p.part, p.bring, p).store(gl.where(finite, round_to_tf32(v - high), v))
    elif p.size == 4:
        to.store(round_to_tf32(v))
    else:
        to.store(v)


@gluon.jit
def _inverse(by):
    return ((1 << 39) + by.to(gl.int64) - 1) // by


@gluon.jit
def _split(v, by, inverse):
    """v divided by `by`, rounded down, and what remains: exact for -by < v < 2^23 and by < 2^15 (shift.MOST_ROWS and
    MOST_DIVISOR).  A division by what is known at run time alone costs four times as much, and every pixel needs one.
    In integers: of fp32 the compiler would not know that neighbours have the same quotient, and store one by one."""
    q = (v.to(gl.int64) * inverse >> 39).to(gl.int32)
    return q, v - q * by


@gluon.jit
def _planes(row, sizes, p: gl.constexpr):
    """Row `row` of all planes one after the other, as (image, plane in it, row in that)."""
    m, h = _split(row, sizes[2], sizes[BY_IMAGE])
    if p.volume:
        n, d = _split(m, sizes[PLANES], sizes[BY_PLANES])
    else:
        n = m
        d = m * 0
    return n, d, h


@gluon.jit
def _decode(t, sizes, p: gl.constexpr):
    """Tile t as (first output channel, phase along the height, tile along the width, first row, phase along the depth).
    Channel tiles are neighbours, then phases: they share input pixels in the L2.  Some phases have more taps than others; by `spin` a
    CTA goes on to the next phase in every round of the grid, rather than do the same one in all of them (shift.walk)."""
    tiles_co, tiles_w = sizes[0], sizes[1]
    PHASES: gl.constexpr = len(p.low) * p.depth.stride
    co = t % tiles_co * p.fold.of_tile
    phase = t // tiles_co % PHASES
    t = t // tiles_co // PHASES
    if PHASES > 1:
        phase = (phase + t // sizes[OF_ROUND] * sizes[SPIN]) % PHASES
    return co, phase % len(p.low), t % tiles_w, t // tiles_w * p.rows, phase // len(p.low)


@gluon.jit
def _axis(phase, axis: gl.constexpr):
    """Of one phase: how many taps it has, the first of them and the offset of what that tap reads; geometry.Axis.taps
    has the arithmetic."""
    g: gl.constexpr = axis.gcd
    step: gl.constexpr = axis.stride // axis.gcd
    t = phase + axis.padding
    first = t // g * axis.inverse % step
    count = gl.where(t % g == 0, (axis.kernel - first + step - 1) // step, 0)
    return count, first, (t - axis.dilation * first) // axis.stride


@gluon.jit
def _first_row(phase, p: gl.constexpr):
    """The first input row that output row 0 of a phase reads."""
    low = phase * 0 + p.low[0]
    for a in gl.static_range(1, len(p.low)):
        low = gl.where(phase == a, p.low[a], low)
    return low


@gluon.jit
def _readings(phase, phase_d, blocks, p: gl.constexpr):
    """What a tile of these phases reads: how many blocks; of the depth, the first tap and the plane that it reads,
    counted from the output's; of the height, how many taps are readings of their own, the first tap and its row."""
    many, tap_d, plane = blocks, 0, 0
    if p.volume:
        count_d, tap_d, plane = _axis(phase_d, gl.constexpr(p.depth))
        many = count_d * blocks
    if p.by_row:
        count, tap, row = _axis(phase, gl.constexpr(p.height))
        return many * count, tap_d, plane, count, tap, row
    elif p.alike:
        count, tap, row = _axis(phase, gl.constexpr(p.height))
        return many, tap_d, plane, 1, tap, _first_row(phase, p)
    else:
        return many, tap_d, plane, 1, 0, _first_row(phase, p)


@gluon.jit
def _block(i, sizes, readings, p: gl.constexpr):
    """Block i of a tile: its channels' index, the first of its blocks of weights, and the plane and row that it reads,
    counted from the output's."""
    many, tap_d, plane, count, tap, row = readings
    blocks = sizes[3]
    kb = i
    if p.volume or p.by_row:
        j = i // blocks
        kb = i - j * blocks
        if p.by_row:
            h = j % count
            tap += h * (p.height.stride // p.height.gcd)
            row -= h * (p.height.dilation // p.height.gcd)
            j = j // count
        if p.volume:
            tap_d += j * (p.depth.stride // p.depth.gcd)
            plane -= j * (p.depth.dilation // p.depth.gcd)
    if p.partial:
        kb += sizes[FIRST_BLOCK]
    return kb, (tap_d * p.height.kernel + tap) * p.blocks_w, plane, row


@gluon.jit
def _copy(x, to, ready, row, column, kb, delta, sizes, PIXELS: gl.constexpr, p: gl.constexpr, pred):
    """A bulk copy of PIXELS pixels of a row, of block kb of the channels and the plane `delta` after the row's own."""
    n, d, h = _planes(row, sizes, p)
    if p.src_layout == "channels":
        if p.volume:
            to = reinterpret(to, element(p), [1, 1, 1, PIXELS, p.kb], swizzled(p.kb, p.size, 5))
            async_load(x, [n, d + delta, h, column, kb * p.kb], ready, to, pred=pred)
        else:
            to = reinterpret(to, element(p), [1, 1, PIXELS, p.kb], swizzled(p.kb, p.size, 4))
            async_load(x, [n, h, column, kb * p.kb], ready, to, pred=pred)
    else:
        if p.volume:
            to = reinterpret(to, element(p), [1, p.kb, 1, 1, PIXELS], swizzled(PIXELS, p.size, 5))
            async_load(x, [n, kb * p.kb, d + delta, h, column], ready, to, pred=pred)
        else:
            to = reinterpret(to, element(p), [1, p.kb, 1, PIXELS], swizzled(PIXELS, p.size, 4))
            async_load(x, [n, kb * p.kb, h, column], ready, to, pred=pred)


@gluon.jit
def _copy_row(x, ring, ready, s, row, low, j, tile_w, kb, delta, sizes, p: gl.constexpr):
    """Row j of a tile, or 64 pixels of a strip, into stage s; it begins at `row`, or that pixel, and `low` rows further on."""
    to = ring_rows(ring, s * p.pitch + j * p.of_copy, p.of_copy, p)
    if p.strip:
        at = row + (low + delta * sizes[2]) * p.box + p.low_w
        async_load(x, [at + j * p.of_copy, kb * p.kb], ready, to)
    else:
        _copy(x, to, ready, row + low + j, tile_w * p.useful + p.low_w, kb, delta, sizes, p.box, p, True)


@gluon.jit
def _bring_by_tma(x, ring, full, empty, sizes, p: gl.constexpr):
    """channels_last, or a copy with its channels innermost: a bulk copy a row of pixels, or 64 pixels of a strip."""
    blocks, tiles = sizes[3], sizes[4]
    i = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        co, phase, tile_w, row, phase_d = _decode(t, sizes, p)
        readings = _readings(phase, phase_d, blocks, p)
        for b in range(0, readings[0]):
            kb, base, delta, low = _block(b, sizes, readings, p)
            s = i % p.stages
            mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)
            mbarrier.expect(full.index(s), p.halo_rows * p.of_copy * p.kb * p.size)
            if p.halo_rows <= 12:
                for j in gl.static_range(gl.constexpr(p.halo_rows)):
                    _copy_row(x, ring, full.index(s), s, row, low, j, tile_w, kb, delta, sizes, p)
            else:  # unrolled, so many rows would spill
                for j in range(0, p.halo_rows):
                    _copy_row(x, ring, full.index(s), s, row, low, j, tile_w, kb, delta, sizes, p)
            i += 1


@gluon.jit
def _load(x, sizes, kb, delta, tile_w, row, J: gl.constexpr, p: gl.constexpr):
    """Chunk J of a tile's input in registers, [pixels, channels]."""
    n_in, c_in, h_in, w_in, x_n, x_c, x_h, x_w = (
        sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12]
    )  # fmt: skip
    layout: gl.constexpr = _producer_layout(p)
    BRING: gl.constexpr = p.bring
    z = opaque_zero(kb)
    c = (kb + z) * p.kb + gl.arange(0, p.kb, layout=gl.SliceLayout(0, layout))
    at = (J + z) * BRING + gl.arange(0, p.bring, layout=gl.SliceLayout(1, layout))
    w = tile_w * p.useful + p.low_w + at % p.box
    n, d, h = _planes(row + at // p.box, sizes, p)
    ok = (at < p.halo_rows * p.box) & (n >= 0) & (n < n_in) & (h < h_in) & (w >= 0) & (w < w_in)
    offset = n * x_n + h * x_h
    if p.volume:
        d_in, x_d = sizes[D_IN], sizes[X_D]
        d += delta
        ok = ok & (d >= 0) & (d < d_in)
        offset += d * x_d
    if p.src_layout == "channels":  # spelt out, since a captured 1 is not known to be one
        offsets = (offset + w * x_w)[:, None] + c[None, :]
    else:
        offsets = (offset + w)[:, None] + (c * x_c)[None, :]
    return gl.load(x + offsets, mask=ok[:, None] & (c < c_in)[None, :], other=0.0)


@gluon.jit
def _row_of(block, tile, tiles_co, p: gl.constexpr):
    """The first row of a block of weights in the packed weight, of channel tile `tile`, which has `spread` blocks a tap."""
    S: gl.constexpr = p.fold.spread
    if S == 1:
        return (block * tiles_co + tile) * M
    else:
        return ((block // S * tiles_co + tile) * S + block % S) * M


@gluon.jit
def _bring_block(w, to, full, block, tile, kb, sizes, p: gl.constexpr):
    """A block of weights of channel tile `tile` and of block kb of the input's channels: from the packed weight, or from the
    weight as it lies, [input channel, tap, output channel]."""
    if p.raw:
        S: gl.constexpr = p.fold.spread
        to = reinterpret(to, element(p), [p.kb, 1, M], swizzled(M, p.size, 3))
        async_load(w, [kb * p.kb, block // S, (tile * S + block % S) * M], full, to)
    else:
        async_load(w, [_row_of(block, tile, sizes[0], p), kb * p.kb], full, to)


@gluon.jit
def _push(w, ring, full, empty, sizes, i, co, phase, phase_d, A: gl.constexpr, p: gl.constexpr):
    """The blocks of weights that _phase takes into their ring; i counts them and is returned."""
    readings = _readings(phase, phase_d, sizes[3], p)
    for b in range(0, readings[0]):
        kb, base, delta, low = _block(b, sizes, readings, p)
        for k in gl.static_range(len(p.taps[A])):
            s = i % p.slots
            mbarrier.wait(empty.index(s), (i // p.slots & 1) ^ 1)
            mbarrier.expect(full.index(s), p.parts * M * p.kb * p.size)
            for part in gl.static_range(gl.constexpr(p.parts)):
                block = base + (p.taps[A][k][1] + part * p.whole)
                _bring_block(
                    w, ring.index(s * p.parts + part), full.index(s), block, co // p.fold.of_tile, kb, sizes, p
                )
            i += 1
    return i


@gluon.jit
def _push_all(w, ring, full, sizes, p: gl.constexpr):
    """Where they fit: all weights of this CTA's channel tile, which never changes then."""
    tiles_co, blocks = sizes[0], sizes[3]
    co = gl.program_id(0) % tiles_co
    mbarrier.expect(full.index(0), p.slots * p.parts * M * p.kb * p.size)
    for tap in range(0, p.whole * p.parts):
        for kb in range(0, blocks):
            _bring_block(w, ring.index(tap * blocks + kb), full.index(0), tap, co, kb, sizes, p)


@gluon.jit
def _bring_weights(w, ring, full, empty, sizes, p: gl.constexpr):
    """The packed weight [tap or folded offset, rows of M, input channel], or the weight as it lies, an M x KB block a slot."""
    if not p.raw:
        await_launches(sizes[4])
    i = 0
    for t in range(gl.program_id(0), sizes[4], gl.num_programs(0)):
        co, phase, tile_w, row, phase_d = _decode(t, sizes, p)
        if len(p.taps) > 1:
            for a in gl.static_range(len(p.taps)):
                if p.all_phases or phase == a:
                    i = _push(w, ring, full, empty, sizes, i, co, a, phase_d, a, p)
        elif p.all_phases:
            for a in range(0, p.height.stride):
                i = _push(w, ring, full, empty, sizes, i, co, a, phase_d, 0, p)
        else:
            i = _push(w, ring, full, empty, sizes, i, co, phase, phase_d, 0, p)


@gluon.jit
def _bring_by_threads(x, ring, full, empty, sizes, p: gl.constexpr):
    """What no bulk copy brings, or not as fast: through registers, where it is rounded, transposed on the way to shared
    memory.  A chunk is loaded before the one ahead of it is stored: latency decides here."""
    blocks, tiles = sizes[3], sizes[4]
    i = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        co, phase, tile_w, row, phase_d = _decode(t, sizes, p)
        readings = _readings(phase, phase_d, blocks, p)
        for b in range(0, readings[0]):
            kb, base, delta, low = _block(b, sizes, readings, p)
            s = i % p.stages
            value = _load(x, sizes, kb, delta, tile_w, row + low, 0, p)
            mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)
            for n in gl.static_range(gl.constexpr(p.brings)):
                if n + 1 < p.brings:
                    ahead = _load(x, sizes, kb, delta, tile_w, row + low, n + 1, p)
                _put(value, ring, s * p.pitch + n * p.bring, p)
                if n + 1 < p.brings:
                    value = ahead
            fence_async_shared()
            mbarrier.arrive(full.index(s), count=1)
            i += 1


@gluon.jit
def _tile_at(t, sizes, p: gl.constexpr):
    """Of tile t: its first row and column and, of what it reads, what decides about pixels."""
    co, phase, tile_w, row, phase_d = _decode(t, sizes, p)
    many, tap_d, plane, taps, tap, low = _readings(phase, phase_d, sizes[3], p)
    return row, tile_w * p.useful + p.low_w, many, plane, taps, low


@gluon.jit
def _issue(x, staging, ready, sizes, at, count, p: gl.constexpr):
    """Bulk copy number `count` into the staging buffer, of the chunk that `at` = (tile, block, chunk, *_tile_at(tile))
    names; returns the next one's."""
    ACROSS: gl.constexpr = p.box // p.bring
    t, b, n, row, column, many, plane, taps, low = at
    there = t < sizes[4]
    slot = count % p.staging
    kb, base, delta, below = _block(b, sizes, (many, 0, plane, taps, 0, low), p)
    mbarrier.expect(ready.index(slot), p.bring * p.kb * p.size, pred=there)
    _copy(
        x, staging.index(slot), ready.index(slot), row + below + n // ACROSS, column + n % ACROSS * p.bring, kb, delta,
        sizes, p.bring, p, there,
    )  # fmt: skip
    n += 1
    if n == p.brings:
        n = 0
        b += 1
        if b == many:
            b = 0
            t += gl.num_programs(0)
            row, column, many, plane, taps, low = _tile_at(t, sizes, p)
    return t, b, n, row, column, many, plane, taps, low


@gluon.jit
def _bring_staged(x, staging, ready, ring, full, empty, sizes, p: gl.constexpr):
    """As _bring_by_threads, with bulk copies a few chunks ahead: they keep more bytes under way than registers can."""
    tiles = sizes[4]
    layout: gl.constexpr = _producer_layout(p)
    t0 = gl.program_id(0)
    row0, column0, many0, plane0, taps0, low0 = _tile_at(t0, sizes, p)
    at = (t0, t0 * 0, t0 * 0, row0, column0, many0, plane0, taps0, low0)
    for f in gl.static_range(gl.constexpr(p.staging)):
        at = _issue(x, staging, ready, sizes, at, f, p)
    i = 0
    count = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for _ in range(0, _tile_at(t, sizes, p)[2]):
            s = i % p.stages
            mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)
            for n in range(0, p.brings):
                slot = count % p.staging
                mbarrier.wait(ready.index(slot), count // p.staging & 1)
                if p.src_layout == "channels":
                    value = staging.index(slot).load(layout)
                else:
                    value = staging.index(slot).permute((1, 0)).load(layout)
                _put(value, ring, s * p.pitch + n * p.bring, p)
                fence_async_shared()
                barrier()  # everyone has read the slot
                at = _issue(x, staging, ready, sizes, at, count + p.staging, p)
                count += 1
            mbarrier.arrive(full.index(s), count=1)
            i += 1


@gluon.jit
def _bring(x, staging, ready, ring, full, empty, sizes, p: gl.constexpr):
    if sizes[COPIED] != 0:
        await_launches(sizes[4])
    if p.how == "bulk":
        _bring_by_tma(x, ring, full, empty, sizes, p)
    elif p.how == "staged":
        _bring_staged(x, staging, ready, ring, full, empty, sizes, p)
    else:
        _bring_by_threads(x, ring, full, empty, sizes, p)


@gluon.jit
def _half(v, p: gl.constexpr):
    """The first half of each group's columns, and the second."""
    quarter: gl.constexpr = v.type.shape[1] // (2 * p.groups)
    a, b = gl.split(v.reshape([M, p.groups, 2, quarter]).permute((0, 1, 3, 2)))
    return a.reshape([M, p.groups * quarter]), b.reshape([M, p.groups * quarter])


@gluon.jit
def _here(i, p: gl.constexpr):
    """A zero that keeps a store's arithmetic behind the multiplications where registers are few: done before them, it
    would push accumulators out.  Where the input comes by bulk copies there are registers for it."""
    if p.how == "bulk":
        return 0
    else:
        return opaque_zero(i)


@gluon.jit
def _row_and_column(at, BY: gl.constexpr, i, UNIT: gl.constexpr, p: gl.constexpr):
    """`at` by BY and what is left, of index i of a chunk, of UNIT indices a pixel; each group of warps has a part of the chunk.  Both
    parts are divided, and one selected: of a sum of both the compiler does not know which are neighbours, and stores one by one."""
    PART: gl.constexpr = p.chunk // p.groups * UNIT
    APART: gl.constexpr = p.pixels // p.groups * UNIT - PART
    if p.groups == 2 and APART > 0:
        second = i >= PART
        return gl.where(second, (at + APART) // BY, at // BY), gl.where(second, (at + APART) % BY, at % BY)
    else:
        return at // BY, at % BY


@gluon.jit
def _where(row, i, FIRST: gl.constexpr, UNIT: gl.constexpr, phase_d, sizes, p: gl.constexpr):
    """Of index i of a chunk, of a tile's pixels from FIRST on, of UNIT indices a pixel: the element offset of its output row, of
    phase 0 along the height; the row's number in that phase; whether it exists; and the index in the row."""
    n_in, y_n = sizes[5], sizes[16]
    at = FIRST * UNIT + i
    if p.strip:
        q, column = _row_and_column(at + row * UNIT, p.box * UNIT, i, UNIT, p)
        n, d, h = _planes(q, sizes, p)
        ok = n < n_in
    else:
        q, column = _row_and_column(at, p.box * UNIT, i, UNIT, p)
        n, d, h = _planes(row + q, sizes, p)
        ok = (q < p.rows) & (n < n_in)
    ok = ok & (column < p.useful * UNIT)
    if p.volume:
        d = d * p.depth.stride + phase_d
        return n * y_n + d * sizes[Y_D], h, ok & (d < sizes[D_OUT]), column
    else:
        return n * y_n, h, ok, column


@gluon.jit
def _phase_of(row, p: gl.constexpr):
    """The phase along the width in a row of all accumulators' rows of a channel, and whether there is one."""
    F: gl.constexpr = p.fold.phases
    b = row
    there = row < p.fold.many[0]
    for g in gl.static_range(1, gl.constexpr(p.fold.accumulators)):
        further = row >= g * F
        b = gl.where(further, row - g * F + p.fold.first[g], b)
        there = gl.where(further, row - g * F < p.fold.many[g], there)
    return b, there


@gluon.jit
def _store_pixels(v, buffer, y, sizes, phase, tile_w, row, phase_d, co, FIRST: gl.constexpr, p: gl.constexpr):
    """Write a chunk [channels, pixels times joined phases] where neighbouring pixels are neighbours in memory."""
    c_out, h_out, w_out, y_c, y_h = sizes[13], sizes[14], sizes[15], sizes[17], sizes[18]
    layout: gl.constexpr = _store_layout(p)
    buffer.store(v)
    v = buffer.slice(0, p.dst_channels, 0).load(layout)
    i = gl.arange(0, p.chunk * p.joined, layout=gl.SliceLayout(0, layout)) + _here(co, p) * 16
    c = co + gl.arange(0, p.dst_channels, layout=gl.SliceLayout(1, layout))
    offset, q, ok, column = _where(row, i, FIRST, p.joined, phase_d, sizes, p)
    h = q * p.height.stride + phase
    ok = ok & (h < h_out)
    if p.joined == p.stride_w:
        w = tile_w * (p.useful * p.joined) + column
    else:  # there are fewer phases than rows
        b, there = _phase_of(column % p.joined, p)
        w = (tile_w * p.useful + column // p.joined) * p.stride_w + b
        ok = ok & there
    ok = ok & (w < w_out)
    gl.store(y + (c * y_c)[:, None] + (offset + h * y_h + w)[None, :], v, mask=(c < c_out)[:, None] & ok[None, :])


@gluon.jit
def _store_channels(
    v, buffer, y, sizes, phase, tile_w, row, phase_d, co, FIRST: gl.constexpr, G: gl.constexpr, p: gl.constexpr
):  # fmt: skip
    """Write a chunk of accumulator G, [pixels times folded phases, channels], where neighbouring channels are
    neighbours in memory."""
    c_out, h_out, w_out, y_h, y_w = sizes[13], sizes[14], sizes[15], sizes[18], sizes[19]
    layout: gl.constexpr = _store_layout(p)
    F: gl.constexpr = p.fold.phases
    if F > 1:
        v = v.reshape([p.fold.channels, F, p.chunk]).permute((2, 1, 0)).reshape([p.chunk * F, p.fold.channels])
        buffer.store(v)
    else:
        buffer.store(v.permute((1, 0)))
    v = buffer.slice(0, p.dst_channels, 1).load(layout)
    i = gl.arange(0, p.chunk * F, layout=gl.SliceLayout(1, layout)) + _here(co, p) * 16
    c = co + gl.arange(0, p.dst_channels, layout=gl.SliceLayout(0, layout))
    offset, q, ok, column = _where(row, i, FIRST, F, phase_d, sizes, p)
    h = q * p.height.stride + phase
    w = (tile_w * p.useful + column // F) * p.stride_w + p.fold.first[G] + column % F
    ok = ok & (h < h_out) & (w < w_out)
    if p.fold.many[G] < F:
        ok = ok & (column % F < p.fold.many[G])
    gl.store(y + (offset + h * y_h + w * y_w)[:, None] + c[None, :], v, mask=ok[:, None] & (c < c_out)[None, :])


@gluon.jit
def _repeated(v, MANY: gl.constexpr):
    if MANY == 1:
        return (v,)
    else:
        return _repeated(v, MANY - 1) + (v,)


@gluon.jit
def _put_at(accs, G: gl.constexpr, acc):
    return accs[:G] + (acc,) + accs[G + 1 :]


@gluon.jit
def _store(accs, buffer, y, sizes, phase, tile_w, row, phase_d, co, FIRST: gl.constexpr, p: gl.constexpr):
    """Write the accumulators, halved until a chunk fits the buffer."""
    F: gl.constexpr = p.fold.phases
    A: gl.constexpr = p.fold.accumulators
    if accs[0].type.shape[1] > p.chunk:
        half: gl.constexpr = accs[0].type.shape[1] // (2 * p.groups)
        before = accs
        behind = accs
        for g in gl.static_range(A):
            a, b = _half(accs[g], p)
            before = _put_at(before, g, a)
            behind = _put_at(behind, g, b)
        _store(before, buffer, y, sizes, phase, tile_w, row, phase_d, co, FIRST, p)
        _store(behind, buffer, y, sizes, phase, tile_w, row, phase_d, co, FIRST + half, p)
    else:
        for g in gl.static_range(A):
            accs = _put_at(accs, g, accs[g].to(_stored(p)))
        APART: gl.constexpr = M if p.fold.spread > 1 else 0  # channels from accumulator to accumulator
        if p.dst_layout == "channels":
            for g in gl.static_range(A):
                _store_channels(accs[g], buffer, y, sizes, phase, tile_w, row, phase_d, co + g * APART, FIRST, g, p)
        elif p.fold.spread > 1:
            for g in gl.static_range(A):
                _store_pixels(accs[g], buffer, y, sizes, phase, tile_w, row, phase_d, co + g * APART, FIRST, p)
        else:
            v = accs[0]
            if A == 2:
                v = gl.join(accs[0], accs[1])
            elif A > 2:  # the last twice, where there are three
                v = gl.join(gl.join(accs[0], accs[1]), gl.join(accs[2], accs[A - 1])).permute((0, 1, 3, 2))
            if F > 1:
                if A > 1:
                    v = v.reshape([p.fold.channels, F, p.chunk, p.joined // F]).permute((0, 2, 3, 1))
                else:
                    v = v.reshape([p.fold.channels, F, p.chunk]).permute((0, 2, 1))
            v = v.reshape([p.fold.channels, p.chunk * p.joined])
            _store_pixels(v, buffer, y, sizes, phase, tile_w, row, phase_d, co, FIRST, p)


@gluon.jit
def _wait(accs, OUTSTANDING: gl.constexpr, p: gl.constexpr):
    if p.fold.accumulators == 1:
        return (warpgroup_mma_wait(OUTSTANDING, deps=accs),)
    else:
        return warpgroup_mma_wait(OUTSTANDING, deps=accs)


@gluon.jit
def _taps(
    accs, weights, w_full, w_empty, ring, s, j, slot0, blocks,
    START: gl.constexpr, A: gl.constexpr, p: gl.constexpr,
):  # fmt: skip
    """Add the products of one block of channels and its taps.  Resident weights are at slot0 and so many blocks further
    on, streamed ones at j; returns the accumulators and j."""
    for k in gl.static_range(len(p.taps[A])):
        if p.resident:
            slot = slot0 + p.taps[A][k][1] * blocks
        else:
            slot = j % p.slots
            mbarrier.wait(w_full.index(slot), j // p.slots & 1)
        operand = ring_view(ring, s, START + p.taps[A][k][2], p)
        weight = weights.index(slot)
        if p.raw:
            weight = weight.permute((1, 0))
        acc = warpgroup_mma(weight, operand, accs[p.taps[A][k][0]], is_async=True)
        accs = _put_at(accs, p.taps[A][k][0], acc)
        if not p.resident:
            if k > 0:
                accs = _wait(accs, 1, p)
                mbarrier.arrive(w_empty.index((j - 1) % p.slots), count=1)
            j += 1
    if len(p.taps[A]) > 0:
        accs = _wait(accs, 0, p)
        if not p.resident:
            mbarrier.arrive(w_empty.index((j - 1) % p.slots), count=1)
    return accs, j


@gluon.jit
def _taps_in_parts(
    accs, weights, w_full, w_empty, ring, s, j, slot0, blocks,
    START: gl.constexpr, A: gl.constexpr, p: gl.constexpr,
):  # fmt: skip
    """As _taps, of operands in two parts: three products, without that of the second parts.  The tensor core truncates as it
    accumulates, so a tap's sum is added in fp32."""
    for k in gl.static_range(len(p.taps[A])):
        # Once, which the assembler does not know: it would put off the additions, keep the sums of several taps and
        # spill them.
        for once in range(0, 1 + (blocks >> 30)):
            if p.resident:
                high = slot0 + p.taps[A][k][1] * blocks
                low = high + p.slots
            else:
                slot = (j + k + once) % p.slots
                mbarrier.wait(w_full.index(slot), (j + k + once) // p.slots & 1)
                high = 2 * slot
                low = high + 1
            s += opaque_zero(s)
            x_high = ring_view(ring, s, START + p.taps[A][k][2], p)
            x_low = ring_view(ring, s, START + p.part + p.taps[A][k][2], p)
            sum = warpgroup_mma(weights.index(low), x_high, accs[0], use_acc=False, is_async=True)
            sum = warpgroup_mma(weights.index(high), x_low, sum, is_async=True)
            sum = warpgroup_mma(weights.index(high), x_high, sum, is_async=True)
            sum = warpgroup_mma_wait(0, deps=(sum,))
            if not p.resident:
                mbarrier.arrive(w_empty.index(slot), count=1)
            accs = _put_at(accs, p.taps[A][k][0], accs[p.taps[A][k][0]] + sum)
    return accs, j + len(p.taps[A])


@gluon.jit
def _phase(
    y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w, row,
    phase, phase_d, A: gl.constexpr, CONSUMER: gl.constexpr, p: gl.constexpr,
):  # fmt: skip
    """One tile's outputs of a phase along the height, of which p.taps[A] are the taps.  i and j count the blocks taken
    from the rings of input and weights; returns j."""
    blocks, c_out, has_bias = sizes[3], sizes[13], sizes[20]
    layout: gl.constexpr = _accumulator(p)
    PIXELS: gl.constexpr = p.pixels
    START: gl.constexpr = CONSUMER * p.pixels if p.work == "halves" else 0  # this consumer's pixels in the tile
    accs = _repeated(gl.zeros([M, PIXELS], gl.float32, layout), gl.constexpr(p.fold.accumulators))
    readings = _readings(phase, phase_d, blocks, p)
    for b in range(0, readings[0]):
        z = opaque_zero(b)
        kb, base, delta, low = _block(b, sizes, readings, p)
        s = (i + b) % p.stages
        slot0 = base * blocks + kb + z
        mbarrier.wait(x_full.index(s), (i + b) // p.stages & 1)
        if p.parts == 2:
            accs, j = _taps_in_parts(accs, weights, w_full, w_empty, ring, s, j, slot0, blocks, START, A, p)
        else:
            accs, j = _taps(accs, weights, w_full, w_empty, ring, s, j, slot0, blocks, START, A, p)
        if p.all_phases:  # the last of them
            mbarrier.arrive(x_empty.index(s), count=1, pred=phase == p.height.stride - 1)
        else:
            mbarrier.arrive(x_empty.index(s), count=1)
    c = co + gl.arange(0, M, layout=gl.SliceLayout(1, layout)) // p.fold.phases
    bias_of_row = gl.load(bias + c, mask=(c < c_out) & (has_bias != 0), other=0.0).to(gl.float32)[:, None]
    for g in gl.static_range(gl.constexpr(p.fold.accumulators)):
        if g > 0 and p.fold.spread > 1:
            c += M
            bias_of_row = gl.load(bias + c, mask=(c < c_out) & (has_bias != 0), other=0.0).to(gl.float32)[:, None]
        accs = _put_at(accs, g, accs[g] + bias_of_row)
    _store(accs, buffer, y, sizes, phase, tile_w, row, phase_d, co, START, p)
    return j


@gluon.jit
def _multiply(
    w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, CONSUMER: gl.constexpr, p: gl.constexpr
):  # fmt: skip
    """One of those who multiply: every tile, its half of every tile's pixels, or every other tile."""
    blocks, tiles = sizes[3], sizes[4]
    buffer = buffers.index(CONSUMER)
    i = 0
    j = 0
    if p.resident:
        if CONSUMER == 0:
            if not p.raw:
                await_launches(tiles)
            _push_all(w, weights, w_full, sizes, p)
        mbarrier.wait(w_full.index(0), 0)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        co, phase, tile_w, row, phase_d = _decode(t, sizes, p)
        if p.work != "tiles" or t // gl.num_programs(0) % 2 == CONSUMER:
            if len(p.taps) > 1:
                for a in gl.static_range(len(p.taps)):
                    if p.all_phases or phase == a:
                        j = _phase(
                            y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w,
                            row, a, phase_d, a, CONSUMER, p,
                        )  # fmt: skip
            elif p.all_phases:
                for a in range(0, p.height.stride):
                    j = _phase(
                        y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w, row,
                        a, phase_d, 0, CONSUMER, p,
                    )  # fmt: skip
            else:
                j = _phase(
                    y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w, row,
                    phase, phase_d, 0, CONSUMER, p,
                )  # fmt: skip
        i += _readings(phase, phase_d, blocks, p)[0]


# The run-time scalars, in the order in which the parts of the kernel find them in `sizes`.
SCALARS = (
    "tiles_co tiles_w image blocks tiles n_in c_in h_in w_in x_n x_c x_h x_w c_out h_out w_out y_n y_c y_h y_w has_bias "
    "planes d_in x_d d_out y_d of_part y_part copied of_round spin"
).split()


def _name(specialization):
    p = specialization.constants["p"]
    layouts = f"{p.src_layout}_{p.dst_layout}"
    pixels = f"{p.of_tile}of{p.box}" if p.strip else f"{p.rows}x{p.box}"
    return f"tconv_shift_forward_{layouts}_{p.dtype}_{pixels}x{p.kb}_{p.work}"


@gluon.jit(repr=_name, do_not_specialize=SCALARS)
def shift(
    x, w, bias, y,
    tiles_co, tiles_w, image, blocks, tiles, n_in, c_in, h_in, w_in, x_n, x_c, x_h, x_w,
    c_out, h_out, w_out, y_n, y_c, y_h, y_w, has_bias,
    planes, d_in, x_d, d_out, y_d, of_part, y_part, copied, of_round, spin,
    p: gl.constexpr,
):  # fmt: skip
    """y = conv_transpose3d(x, w) + bias; `w` is packed by pack_weight unless p.raw, `p` a tconv.shift.Shift.  Where that is partial,
    program (i, part) sums the part's `of_part` blocks of channels alone, into a y of its own, `y_part` elements on.
    copied: whether a launch ahead of this one writes x."""
    x_n = x_n // p.vector * p.vector
    x_d = x_d // p.vector * p.vector
    x_h = x_h // p.vector * p.vector
    if p.src_layout == "channels":
        x_w = x_w // p.vector * p.vector
        c_in = c_in // p.vector * p.vector
    else:
        x_c = x_c // p.vector * p.vector
        w_in = w_in // p.vector * p.vector
    y_n = y_n // p.dst_vector * p.dst_vector
    y_d = y_d // p.dst_vector * p.dst_vector
    y_h = y_h // p.dst_vector * p.dst_vector
    if p.dst_layout == "channels":
        y_w = y_w // p.dst_vector * p.dst_vector
        c_out = c_out // p.dst_vector * p.dst_vector
    else:
        y_c = y_c // p.dst_vector * p.dst_vector
        w_out = w_out // p.dst_vector * p.dst_vector
    first_block = 0
    if p.partial:
        part = gl.program_id(1)
        first_block = part * of_part
        blocks = gl.where(blocks - first_block < of_part, blocks - first_block, of_part)
        has_bias = gl.where(part == 0, has_bias, 0)
        y += part * (y_part // p.dst_vector * p.dst_vector)
    sizes = (
        tiles_co, tiles_w, image, blocks, tiles, n_in, c_in, h_in, w_in, x_n, x_c, x_h, x_w,
        c_out, h_out, w_out, y_n, y_c, y_h, y_w, has_bias, planes, d_in, x_d, d_out, y_d,
        _inverse(image), _inverse(planes), first_block, copied, of_round, spin,
    )  # fmt: skip
    if p.raw:
        weights = gl.allocate_shared_memory(element(p), [p.slots, p.kb, M], swizzled(M, p.size))
    else:
        weights = gl.allocate_shared_memory(element(p), [p.slots * p.parts, M, p.kb], swizzled(p.kb, p.size))
    ring = ring_memory(p)
    if p.dst_layout == "channels":
        buffers = gl.allocate_shared_memory(
            _stored(p), [p.consumers, p.chunk * p.joined, p.fold.channels], swizzled(p.fold.channels, p.dst_size)
        )
    else:
        buffers = gl.allocate_shared_memory(
            _stored(p), [p.consumers, p.fold.channels, p.chunk * p.joined], _pixel_buffer(p)
        )
    # All before the first barrier is initialised: what is allocated later may share the memory of a buffer that is not
    # used any more, and a bulk copy into the place of a barrier goes wrong.
    if p.how == "staged":
        if p.src_layout == "channels":
            staging = gl.allocate_shared_memory(element(p), [p.staging, p.bring, p.kb], swizzled(p.kb, p.size))
        else:
            staging = gl.allocate_shared_memory(element(p), [p.staging, p.kb, p.bring], swizzled(p.bring, p.size))
        ready = gl.allocate_shared_memory(gl.int64, [p.staging, 1], mbarrier.MBarrierLayout())
    else:
        staging = ring
        ready = ring
    x_full = gl.allocate_shared_memory(gl.int64, [p.stages, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [p.stages, 1], mbarrier.MBarrierLayout())
    WEIGHTS: gl.constexpr = 1 if p.resident else p.slots  # barriers
    READERS: gl.constexpr = 2 if p.work == "halves" else 1  # of a stage and of a slot
    w_full = gl.allocate_shared_memory(gl.int64, [WEIGHTS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [WEIGHTS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(gl.constexpr(p.stages)):
        mbarrier.init(x_full.index(s), count=1)
        mbarrier.init(x_empty.index(s), count=READERS)
    for s in gl.static_range(WEIGHTS):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(w_empty.index(s), count=READERS)
    for s in gl.static_range(gl.constexpr(p.staging)):
        mbarrier.init(ready.index(s), count=1)
    fence_async_shared()
    # Spelt out four times: Gluon takes no partition from a variable.
    if p.consumers == 1 and p.resident:
        gl.warp_specialize(
            [
                (_multiply, (w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_bring, (x, staging, ready, ring, x_full, x_empty, sizes, p)),
            ],
            [p.producers],
            [p.registers[1]],
        )
    elif p.consumers == 1:
        gl.warp_specialize(
            [
                (_multiply, (w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_bring, (x, staging, ready, ring, x_full, x_empty, sizes, p)),
                (_bring_weights, (w, weights, w_full, w_empty, sizes, p)),
            ],
            [p.producers, 1],
            [p.registers[1], 24],
        )
    elif p.resident:
        gl.warp_specialize(
            [
                (_multiply, (w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_multiply, (w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 1, p)),
                (_bring, (x, staging, ready, ring, x_full, x_empty, sizes, p)),
            ],
            [4, p.producers],
            [p.registers[0], p.registers[1]],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_multiply, (w, y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 1, p)),
                (_bring, (x, staging, ready, ring, x_full, x_empty, sizes, p)),
                (_bring_weights, (w, weights, w_full, w_empty, sizes, p)),
            ],
            [4, p.producers, 1],
            [p.registers[0], p.registers[1], 24],
        )
