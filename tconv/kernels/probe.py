"""A tiny product of pixels seen at offsets in shared memory, by which tconv/probe.py judges Triton and the GPU."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .hopper import M, barrier, element, ring_memory, ring_rows, ring_view, swizzled


@gluon.jit(repr=lambda specialization: "tconv_probe")
def probe(x, w, y, p: gl.constexpr):
    """y[shift, stage] = w @ x[pixels].T, of p.pixels pixels from each of p.shifts on in each stage.

    x: [p.ring, p.kb], w: [M, p.kb], y: fp32 [shifts, stages, M, p.pixels]; p: a tconv.shift.Probed.
    """
    PIXELS: gl.constexpr = p.pixels
    rows_in: gl.constexpr = gl.BlockedLayout([1, 16 // p.size], [4, 8], [4, 1], [1, 0])
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIXELS, 32 // p.size])
    row = gl.arange(0, M, layout=gl.SliceLayout(1, rows_in))
    column = gl.arange(0, p.kb, layout=gl.SliceLayout(0, rows_in))
    piece = row[:, None] * p.kb + column[None, :]
    weight = gl.allocate_shared_memory(element(p), [M, p.kb], swizzled(p.kb, p.size))
    ring = ring_memory(p)
    weight.store(gl.load(w + piece))
    for first in range(0, p.ring, M):
        ring_rows(ring, first, M, p).store(gl.load(x + first * p.kb + piece))
    fence_async_shared()
    barrier()
    channel = gl.arange(0, M, layout=gl.SliceLayout(1, accumulator))
    pixel = gl.arange(0, PIXELS, layout=gl.SliceLayout(0, accumulator))
    place = channel[:, None] * PIXELS + pixel[None, :]
    for i in gl.static_range(gl.constexpr(len(p.shifts))):
        for stage in range(0, p.stages):
            nothing = gl.zeros([M, PIXELS], gl.float32, accumulator)
            sums = warpgroup_mma(weight, ring_view(ring, stage, gl.constexpr(p.shifts[i]), p), nothing, is_async=True)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            gl.store(y + (i * p.stages + stage) * M * PIXELS + place, sums)
