"""The shift kernel for Hopper (sm_90): implicit GEMM that reads a tile of the input once for all taps.

A tile of input pixels with its halo lies in swizzled shared memory, one pixel a row of KB channels.  Every tap's wgmma
takes that same tile, seen some pixels further on, as its operand B; operand A is the tap's weight.  One CTA an SM walks
over tiles; two groups of warps multiply (half of a tile's pixels each, or every other tile), others bring the operands.

M = 64 output channels, N = pixels of one phase, K = input channels times the phase's taps (docs/kernels.md).
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

# Triton 3.6 to 3.8 and 3.9 name these differently.
_DESCRIPTOR = gl.shared_memory_descriptor
reinterpret = getattr(_DESCRIPTOR, "reinterpret", None) or _DESCRIPTOR._reinterpret
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# How the shifted view of the input ring is written: 3.9 wants a slice, before it a layout without strides does.
SLICE = gl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))
CO = gl.constexpr(64)  # output channels of a tile: wgmma's M


@triton.constexpr_function
def _swizzled(width, size, rank=2):
    """K-major rows of at most 128 bytes, as wgmma and the bulk copies take them."""
    return gl.NVMMASharedLayout(min(128, width * size), 8 * size, rank)


def descriptor_layouts(p):
    """Of the blocks of weights, and of a row of input pixels."""
    return gl.NVMMASharedLayout(min(128, p.kb * p.size), 8 * p.size, 2), gl.NVMMASharedLayout(
        min(128, p.kb * p.size), 8 * p.size, 4
    )


@triton.constexpr_function
def _pixel_rows(pixels, kb):
    """A layout in which `pixels` rows of `kb` channels start at the same address: only its first index moves."""
    bases = [[0, 1 << i] for i in range(kb.bit_length() - 1)] + [[0, 0]] * (pixels.bit_length() - 1)
    return gl.SharedLinearLayout(bases, alignment=1024)


@triton.constexpr_function
def _accumulator(p):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.pixels, 32 // p.size])


@triton.constexpr_function
def _producer_layout(p):
    """Of a chunk [pixels, channels] in the registers of the warps that bring it: 16 bytes of channels a thread."""
    vector = 16 // p.size
    across = p.kb // vector  # threads along the channels
    if p.src_layout == "channels":
        return gl.BlockedLayout([1, vector], [32 // across, across], [p.producers, 1], [1, 0])
    along = min(p.producers, across)
    return gl.BlockedLayout([p.vector, vector], [32, 1], [p.producers // along, along], [0, 1])


@triton.constexpr_function
def _store_layout(p):
    """Of a chunk on its way from shared memory to the output: along the pixels (width) or the channels."""
    if p.dst_layout == "channels":
        vector = 16 // p.size
        across = 64 // vector
        return gl.BlockedLayout([1, vector], [32 // across, across], [4, 1], [1, 0])
    lanes = min(32, p.chunk * p.joined // p.dst_vector)
    return gl.BlockedLayout([1, p.dst_vector], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _rows(ring, row, PIXELS: gl.constexpr, p: gl.constexpr):
    """PIXELS rows of the input ring from `row` on (a multiple of PIXELS), to be written."""
    if SLICE:
        return reinterpret(ring, _element(p), [p.ring // PIXELS, PIXELS, p.kb], _swizzled(p.kb, p.size)).index(
            row // PIXELS
        )
    else:
        flat = reinterpret(ring, _element(p), [p.ring * p.pixels // PIXELS, 1, p.kb], _pixel_rows(PIXELS, p.kb)).index(
            row
        )
        return reinterpret(flat, _element(p), [PIXELS, p.kb], _swizzled(p.kb, p.size))


@gluon.jit
def _view(ring, stage, SHIFT: gl.constexpr, p: gl.constexpr):
    """The pixels of one consumer from SHIFT on in a stage: operand B of one tap."""
    if SLICE:
        span: gl.constexpr = (p.stages - 1) * p.pitch + p.pixels
        flat = reinterpret(ring, _element(p), [p.ring, 1, p.kb], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        tiles = reinterpret(
            flat.slice(SHIFT, span, 0), _element(p), [span // p.pixels, p.pixels, p.kb], _swizzled(p.kb, p.size)
        )
        return tiles.index(stage * (p.pitch // p.pixels))
    else:
        return reinterpret(ring.index(stage * p.pitch + SHIFT), _element(p), [p.pixels, p.kb], _swizzled(p.kb, p.size))


@gluon.jit
def _opaque_zero(i):
    """A zero that the compiler does not see through: what is added to it is not hoisted out of the loop and spilt."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _element(p):
    return {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32}[p.dtype]


@gluon.jit
def _round(v, p: gl.constexpr):
    if p.size == 4:  # wgmma would truncate to TF32; cuDNN rounds to nearest even
        v = gl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [v], dtype=gl.float32, is_pure=True, pack=1)
    return v


@gluon.jit
def _decode(t, sizes, p: gl.constexpr):
    """Tile t as (first output channel, phase along the height, tile along the width, first row).  Channel tiles are
    neighbours, then phases: they share input pixels in the L2."""
    tiles_co, tiles_w = sizes[0], sizes[1]
    co = t % tiles_co * CO
    t = t // tiles_co
    phase = t % len(p.low)
    t = t // len(p.low)
    return co, phase, t % tiles_w, t // tiles_w * p.rows


@gluon.jit
def _first_row(phase, p: gl.constexpr):
    """The first input row that output row 0 of a phase reads."""
    low = phase * 0 + p.low[0]
    for a in gl.static_range(1, len(p.low)):
        low = gl.where(phase == a, p.low[a], low)
    return low


@gluon.jit
def _bring_by_tma(x, ring, full, empty, sizes, p: gl.constexpr):
    """channels_last of 16 bits: a bulk copy a row of pixels."""
    image, blocks, tiles = sizes[2], sizes[3], sizes[4]
    i = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        co, phase, tile_w, row = _decode(t, sizes, p)
        row += _first_row(phase, p)
        for kb in range(0, blocks):
            s = i % p.stages
            mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)
            mbarrier.expect(full.index(s), p.halo_rows * p.box * p.kb * p.size)
            for j in gl.static_range(gl.constexpr(p.halo_rows)):
                v = row + j
                where = [v // image, v % image, tile_w * p.useful + p.low_w, kb * p.kb]
                to = reinterpret(
                    _rows(ring, s * p.pitch + j * p.box, p.box, p),
                    _element(p),
                    [1, 1, p.box, p.kb],
                    _swizzled(p.kb, p.size, 4),
                )
                async_load(x, where, full.index(s), to)
            i += 1


@gluon.jit
def _load(x, sizes, kb, tile_w, row, J: gl.constexpr, p: gl.constexpr):
    """Chunk J of a tile's input in registers, [pixels, channels], rounded to TF32 where that is the precision."""
    image, n_in, c_in, h_in, w_in, x_n, x_c, x_h, x_w = (
        sizes[2], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12]
    )  # fmt: skip
    layout: gl.constexpr = _producer_layout(p)
    BRING: gl.constexpr = p.bring
    z = _opaque_zero(kb)
    c = kb * p.kb + gl.arange(0, p.kb, layout=gl.SliceLayout(0, layout))
    at = (J + z) * BRING + gl.arange(0, p.bring, layout=gl.SliceLayout(1, layout))
    v = row + at // p.box
    w = tile_w * p.useful + p.low_w + at % p.box
    n = v // image
    h = v % image
    ok = (at < p.halo_rows * p.box) & (n < n_in) & (h >= 0) & (h < h_in) & (w >= 0) & (w < w_in)
    offset = n * x_n + h * x_h
    if p.src_layout == "channels":  # spelt out, since a captured 1 is not known to be one
        offsets = (offset + w * x_w)[:, None] + c[None, :]
    else:
        offsets = (offset + w)[:, None] + (c * x_c)[None, :]
    return gl.load(x + offsets, mask=ok[:, None] & (c < c_in)[None, :], other=0.0)


@gluon.jit
def _push(w, ring, full, empty, i, co, kb, tiles_co, A: gl.constexpr, p: gl.constexpr):
    """The blocks of weights of phase A and a block of channels into their ring; i counts them and is returned."""
    for k in gl.static_range(len(p.taps[A])):
        s = i % p.slots
        mbarrier.wait(empty.index(s), (i // p.slots & 1) ^ 1)
        mbarrier.expect(full.index(s), CO * p.kb * p.size)
        async_load(w, [p.taps[A][k][1] * tiles_co * CO + co, kb * p.kb], full.index(s), ring.index(s))
        i += 1
    return i


@gluon.jit
def _push_all(w, ring, full, sizes, p: gl.constexpr):
    """Where they fit: all weights of this CTA's channel tile, which never changes then."""
    tiles_co, blocks = sizes[0], sizes[3]
    co = gl.program_id(0) % tiles_co * CO
    mbarrier.expect(full.index(0), p.slots * CO * p.kb * p.size)
    for tap in range(0, p.taps_all):
        for kb in range(0, blocks):
            async_load(w, [tap * tiles_co * CO + co, kb * p.kb], full.index(0), ring.index(tap * blocks + kb))


@gluon.jit
def _bring_weights(w, ring, full, empty, sizes, p: gl.constexpr):
    """The packed weight [tap, output channel, input channel], a tap's CO x KB block a slot."""
    tiles_co, blocks, tiles = sizes[0], sizes[3], sizes[4]
    i = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        co, phase, tile_w, row = _decode(t, sizes, p)
        for a in gl.static_range(gl.constexpr(p.stride_h)):
            if len(p.low) == 1 or phase == a:
                for kb in range(0, blocks):
                    i = _push(w, ring, full, empty, i, co, kb, tiles_co, a, p)


@gluon.jit
def _bring_by_threads(
    x, ring, full, empty, w, w_ring, w_full, w_empty, sizes, p: gl.constexpr
):  # fmt: skip
    """Any other layout, and fp32: through registers, where it is rounded, transposed on the way to shared memory.  A
    chunk is loaded before the one ahead of it is stored: latency decides here.  The weights come from here too: a warp
    for them would cost the registers of four."""
    tiles_co, blocks, tiles = sizes[0], sizes[3], sizes[4]
    i = 0
    j = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        co, phase, tile_w, row = _decode(t, sizes, p)
        row += _first_row(phase, p)
        for kb in range(0, blocks):
            s = i % p.stages
            value = _load(x, sizes, kb, tile_w, row, 0, p)
            mbarrier.wait(empty.index(s), (i // p.stages & 1) ^ 1)
            for n in gl.static_range(gl.constexpr(p.brings)):
                if n + 1 < p.brings:
                    ahead = _load(x, sizes, kb, tile_w, row, n + 1, p)
                _rows(ring, s * p.pitch + n * p.bring, p.bring, p).store(_round(value, p))
                if n + 1 < p.brings:
                    value = ahead
            fence_async_shared()
            mbarrier.arrive(full.index(s), count=1)
            i += 1
            if not p.resident and p.one_phase:
                for a in gl.static_range(gl.constexpr(p.stride_h)):
                    if phase == a:
                        j = _push(w, w_ring, w_full, w_empty, j, co, kb, tiles_co, a, p)
        if not p.resident and not p.one_phase:
            for a in gl.static_range(gl.constexpr(p.stride_h)):
                for kb in range(0, blocks):
                    j = _push(w, w_ring, w_full, w_empty, j, co, kb, tiles_co, a, p)


@gluon.jit
def _half(v):
    columns: gl.constexpr = v.type.shape[1]
    return gl.split(v.reshape([CO, 2, columns // 2]).permute((0, 2, 1)))


@gluon.jit
def _here(i, p: gl.constexpr):
    """A zero that keeps a store's arithmetic behind the multiplications where registers are few: done before them, it
    would push accumulators out.  Where the input comes by bulk copies there are registers for it."""
    if p.by_tma:
        return 0
    else:
        return _opaque_zero(i)


@gluon.jit
def _store_pixels(v, buffer, y, sizes, phase, tile_w, row, co, FIRST: gl.constexpr, p: gl.constexpr):
    """Write a chunk [CO, pixels (times joined phases)] where neighbouring pixels are neighbours in memory."""
    image, n_in, c_out, h_out, w_out, y_n, y_c, y_h = (
        sizes[2], sizes[5], sizes[13], sizes[14], sizes[15], sizes[16], sizes[17], sizes[18]
    )  # fmt: skip
    layout: gl.constexpr = _store_layout(p)
    buffer.store(v)
    v = buffer.load(layout)
    flat = (FIRST + _here(co, p) * 16) * p.joined + gl.arange(0, p.chunk * p.joined, layout=gl.SliceLayout(0, layout))
    c = co + gl.arange(0, CO, layout=gl.SliceLayout(1, layout))
    r = flat // (p.box * p.joined)
    column = flat % (p.box * p.joined)
    n = (row + r) // image
    q = (row + r) % image
    h = q * p.stride_h + phase
    w = tile_w * (p.useful * p.joined) + column
    ok = (r < p.rows) & (column < p.useful * p.joined) & (n < n_in) & (h < h_out) & (w < w_out)
    gl.store(y + (c * y_c)[:, None] + (n * y_n + h * y_h + w)[None, :], v, mask=(c < c_out)[:, None] & ok[None, :])


@gluon.jit
def _store_channels(v, buffer, y, sizes, phase, tile_w, row, co, FIRST: gl.constexpr, B: gl.constexpr, p: gl.constexpr):
    """Write a chunk [CO, pixels] of phase B where neighbouring channels are neighbours in memory."""
    image, n_in, c_out, h_out, w_out, y_n, y_h, y_w = (
        sizes[2], sizes[5], sizes[13], sizes[14], sizes[15], sizes[16], sizes[18], sizes[19]
    )  # fmt: skip
    layout: gl.constexpr = _store_layout(p)
    buffer.store(v.permute((1, 0)))
    v = buffer.load(layout)
    pixel = FIRST + _here(co, p) * 16 + gl.arange(0, p.chunk, layout=gl.SliceLayout(1, layout))
    c = co + gl.arange(0, CO, layout=gl.SliceLayout(0, layout))
    r = pixel // p.box
    column = pixel % p.box
    n = (row + r) // image
    q = (row + r) % image
    h = q * p.stride_h + phase
    w = (tile_w * p.useful + column) * p.stride_w + B
    ok = (r < p.rows) & (column < p.useful) & (n < n_in) & (h < h_out) & (w < w_out)
    gl.store(y + (n * y_n + h * y_h + w * y_w)[:, None] + c[None, :], v, mask=ok[:, None] & (c < c_out)[None, :])


@gluon.jit
def _store(v0, v1, buffer, y, sizes, phase, tile_w, row, co, FIRST: gl.constexpr, p: gl.constexpr):
    """Write the accumulators of the phases along the width, halved until a chunk fits the buffer."""
    if v0.type.shape[1] > p.chunk:
        half: gl.constexpr = v0.type.shape[1] // 2
        a0, b0 = _half(v0)
        if p.stride_w == 2:
            a1, b1 = _half(v1)
        else:
            a1 = a0
            b1 = b0
        _store(a0, a1, buffer, y, sizes, phase, tile_w, row, co, FIRST, p)
        _store(b0, b1, buffer, y, sizes, phase, tile_w, row, co, FIRST + half, p)
    else:
        if p.dst_layout == "channels":
            _store_channels(v0.to(_element(p)), buffer, y, sizes, phase, tile_w, row, co, FIRST, 0, p)
            if p.stride_w == 2:
                _store_channels(v1.to(_element(p)), buffer, y, sizes, phase, tile_w, row, co, FIRST, 1, p)
        else:
            if p.stride_w == 2:
                v = gl.join(v0.to(_element(p)), v1.to(_element(p))).reshape([CO, 2 * p.chunk])
                _store_pixels(v, buffer, y, sizes, phase, tile_w, row, co, FIRST, p)
            else:
                _store_pixels(v0.to(_element(p)), buffer, y, sizes, phase, tile_w, row, co, FIRST, p)


@gluon.jit
def _wait(acc0, acc1, OUTSTANDING: gl.constexpr, p: gl.constexpr):
    if p.stride_w == 2:
        acc0, acc1 = warpgroup_mma_wait(OUTSTANDING, deps=(acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(OUTSTANDING, deps=(acc0,))
    return acc0, acc1


@gluon.jit
def _phase(
    y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w, row,
    A: gl.constexpr, CONSUMER: gl.constexpr, p: gl.constexpr,
):  # fmt: skip
    """One tile's outputs of phase A along the height.  i and j count the blocks taken from the rings of input and
    weights; returns j."""
    blocks, c_out, has_bias = sizes[3], sizes[13], sizes[20]
    layout: gl.constexpr = _accumulator(p)
    PIXELS: gl.constexpr = p.pixels
    FIRST: gl.constexpr = CONSUMER * p.pixels if p.shared else 0  # this consumer's pixels in the tile
    acc0 = gl.zeros([CO, PIXELS], gl.float32, layout)
    acc1 = acc0
    for kb in range(0, blocks):
        z = _opaque_zero(kb)
        s = (i + kb) % p.stages
        mbarrier.wait(x_full.index(s), (i + kb) // p.stages & 1)
        for k in gl.static_range(len(p.taps[A])):
            if p.resident:
                slot = p.taps[A][k][1] * blocks + kb + z
            else:
                slot = j % p.slots
                mbarrier.wait(w_full.index(slot), j // p.slots & 1)
            operand = _view(ring, s, FIRST + p.taps[A][k][2], p).permute((1, 0))
            if p.taps[A][k][0] == 0:
                acc0 = warpgroup_mma(weights.index(slot), operand, acc0, is_async=True)
            else:
                acc1 = warpgroup_mma(weights.index(slot), operand, acc1, is_async=True)
            if not p.resident:
                if k > 0:
                    acc0, acc1 = _wait(acc0, acc1, 1, p)
                    mbarrier.arrive(w_empty.index((j - 1) % p.slots), count=1)
                j += 1
        if len(p.taps[A]) > 0:
            acc0, acc1 = _wait(acc0, acc1, 0, p)
            if not p.resident:
                mbarrier.arrive(w_empty.index((j - 1) % p.slots), count=1)
        if len(p.low) > 1 or A == p.stride_h - 1:  # nobody else reads this stage
            mbarrier.arrive(x_empty.index(s), count=1)
    c = co + gl.arange(0, CO, layout=gl.SliceLayout(1, layout))
    b = gl.load(bias + c, mask=(c < c_out) & (has_bias != 0), other=0.0).to(gl.float32)[:, None]
    acc0 += b
    acc1 += b
    _store(acc0, acc1, buffer, y, sizes, A, tile_w, row, co, FIRST, p)
    return j


@gluon.jit
def _multiply(
    y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, CONSUMER: gl.constexpr, p: gl.constexpr
):  # fmt: skip
    """One of the two groups of warps that multiply: its half of every tile's pixels, or every other tile."""
    blocks, tiles = sizes[3], sizes[4]
    TURNS: gl.constexpr = 1 if p.shared else 2
    TURN: gl.constexpr = 0 if p.shared else CONSUMER
    buffer = buffers.index(CONSUMER)
    i = TURN * blocks
    j = 0
    if p.resident:
        mbarrier.wait(w_full.index(0), 0)
    for t in range(gl.program_id(0) + TURN * gl.num_programs(0), tiles, TURNS * gl.num_programs(0)):
        co, phase, tile_w, row = _decode(t, sizes, p)
        for a in gl.static_range(gl.constexpr(p.stride_h)):
            if len(p.low) == 1:
                j = _phase(
                    y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w, row,
                    a, CONSUMER, p,
                )  # fmt: skip
            else:
                if phase == a:
                    j = _phase(
                        y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffer, sizes, i, j, co, tile_w, row,
                        a, CONSUMER, p,
                    )  # fmt: skip
        i += TURNS * blocks


# The run-time scalars, in the order in which the parts of the kernel find them in `sizes`.
SCALARS = (
    "tiles_co tiles_w image blocks tiles n_in c_in h_in w_in x_n x_c x_h x_w c_out h_out w_out y_n y_c y_h y_w has_bias"
).split()


def _name(specialization):
    p = specialization.constants["p"]
    layouts = f"{p.src_layout}_{p.dst_layout}"
    return f"tconv_shift_forward_{layouts}_{p.dtype}_{p.rows}x{p.box}x{p.kb}_{'shared' if p.shared else 'each'}"


@gluon.jit(repr=_name, do_not_specialize=SCALARS)
def shift(
    x, w, bias, y,
    tiles_co, tiles_w, image, blocks, tiles, n_in, c_in, h_in, w_in, x_n, x_c, x_h, x_w,
    c_out, h_out, w_out, y_n, y_c, y_h, y_w, has_bias,
    p: gl.constexpr,
):  # fmt: skip
    """y = conv_transpose2d(x, w) + bias; `w` is packed as pack_weight does, `p` a tconv.shift.Shift."""
    if p.src_layout == "channels":
        x_n = x_n // 16 * 16
        x_h = x_h // 16 * 16
        x_w = x_w // 16 * 16
        c_in = c_in // 16 * 16
    else:
        x_n = x_n // p.vector * p.vector
        x_c = x_c // p.vector * p.vector
        x_h = x_h // p.vector * p.vector
        w_in = w_in // p.vector * p.vector
    if p.dst_layout == "channels":
        y_n = y_n // 16 * 16
        y_h = y_h // 16 * 16
        y_w = y_w // 16 * 16
        c_out = c_out // 16 * 16
    else:
        y_n = y_n // p.dst_vector * p.dst_vector
        y_c = y_c // p.dst_vector * p.dst_vector
        y_h = y_h // p.dst_vector * p.dst_vector
        w_out = w_out // p.dst_vector * p.dst_vector
    sizes = (
        tiles_co, tiles_w, image, blocks, tiles, n_in, c_in, h_in, w_in, x_n, x_c, x_h, x_w,
        c_out, h_out, w_out, y_n, y_c, y_h, y_w, has_bias,
    )  # fmt: skip
    weights = gl.allocate_shared_memory(_element(p), [p.slots, CO, p.kb], _swizzled(p.kb, p.size))
    if SLICE:
        ring = gl.allocate_shared_memory(_element(p), [p.ring // 8, 8, p.kb], _swizzled(p.kb, p.size))
    else:
        ring = gl.allocate_shared_memory(_element(p), [p.ring, 1, p.kb], _pixel_rows(p.pixels, p.kb))
    if p.dst_layout == "channels":
        buffers = gl.allocate_shared_memory(_element(p), [2, p.chunk, CO], _swizzled(CO, p.size))
    else:
        buffers = gl.allocate_shared_memory(
            _element(p), [2, CO, p.chunk * p.joined], _swizzled(p.chunk * p.joined, p.size)
        )
    x_full = gl.allocate_shared_memory(gl.int64, [p.stages, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [p.stages, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [p.slots, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [p.slots, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(gl.constexpr(p.stages)):
        mbarrier.init(x_full.index(s), count=1)
        mbarrier.init(x_empty.index(s), count=2 if p.shared else 1)
    for s in gl.static_range(gl.constexpr(p.slots)):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(w_empty.index(s), count=2)
    fence_async_shared()
    if p.resident:
        _push_all(w, weights, w_full, sizes, p)
    if p.by_tma and p.resident:
        gl.warp_specialize(
            [
                (_multiply, (y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_multiply, (y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 1, p)),
                (_bring_by_tma, (x, ring, x_full, x_empty, sizes, p)),
            ],
            [4, 1],
            [p.registers[0], p.registers[1]],
        )
    elif p.by_tma:
        gl.warp_specialize(
            [
                (_multiply, (y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_multiply, (y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 1, p)),
                (_bring_by_tma, (x, ring, x_full, x_empty, sizes, p)),
                (_bring_weights, (w, weights, w_full, w_empty, sizes, p)),
            ],
            [4, 1, 1],
            [p.registers[0], p.registers[1], p.registers[1]],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 0, p)),
                (_multiply, (y, bias, weights, w_full, w_empty, ring, x_full, x_empty, buffers, sizes, 1, p)),
                (_bring_by_threads, (x, ring, x_full, x_empty, w, weights, w_full, w_empty, sizes, p)),
            ],
            [4, p.producers],
            [p.registers[0], p.registers[1]],
        )
