"""What the Hopper kernels share: names that Triton's releases spell differently, and the views of shared memory."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 to 3.8 and 3.9 name these differently.
_DESCRIPTOR = gl.shared_memory_descriptor
reinterpret = getattr(_DESCRIPTOR, "reinterpret", None) or _DESCRIPTOR._reinterpret
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# How the shifted view of the input ring is written: 3.9 wants a slice, before it a layout without strides does.
SLICE = gl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))
M = gl.constexpr(64)  # wgmma's


@triton.constexpr_function
def swizzled(width, size, rank=2, transposed=False):
    """K-major rows of at most 128 bytes, as wgmma and the bulk copies take them."""
    return gl.NVMMASharedLayout(min(128, width * size), 8 * size, rank, transposed)


@triton.constexpr_function
def element(p):
    return {"bf16": gl.bfloat16, "fp16": gl.float16}.get(p.dtype, gl.float32)


@triton.constexpr_function
def _pixel_rows(pixels, kb):
    """A layout in which `pixels` rows of `kb` channels start at the same address: only its first index moves."""
    bases = [[0, 1 << i] for i in range(kb.bit_length() - 1)] + [[0, 0]] * (pixels.bit_length() - 1)
    return gl.SharedLinearLayout(bases, alignment=1024)


@gluon.jit
def ring_memory(p: gl.constexpr):
    """The input ring of a tile: p.ring pixels of p.kb channels."""
    if SLICE:
        return gl.allocate_shared_memory(element(p), [p.ring // 8, 8, p.kb], swizzled(p.kb, p.size))
    else:
        return gl.allocate_shared_memory(element(p), [p.ring, 1, p.kb], _pixel_rows(p.pixels, p.kb))


@gluon.jit
def ring_rows(ring, row, PIXELS: gl.constexpr, p: gl.constexpr):
    """PIXELS rows of the input ring from `row` on (a multiple of PIXELS), to be written."""
    if SLICE:
        tiles = reinterpret(ring, element(p), [p.ring // PIXELS, PIXELS, p.kb], swizzled(p.kb, p.size))
        return tiles.index(row // PIXELS)
    else:
        rows = reinterpret(ring, element(p), [p.ring * p.pixels // PIXELS, 1, p.kb], _pixel_rows(PIXELS, p.kb))
        return reinterpret(rows.index(row), element(p), [PIXELS, p.kb], swizzled(p.kb, p.size))


@gluon.jit
def ring_view(ring, stage, SHIFT: gl.constexpr, p: gl.constexpr):
    """The pixels of one consumer from SHIFT on in a stage: operand B of one tap."""
    if SLICE:
        span: gl.constexpr = (p.stages - 1) * p.pitch + p.pixels
        flat = reinterpret(ring, element(p), [p.ring, 1, p.kb], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        tiles = reinterpret(
            flat.slice(SHIFT, span, 0),
            element(p),
            [span // p.pixels, p.kb, p.pixels],
            swizzled(p.kb, p.size, 2, True),
        )
        return tiles.index(stage * (p.pitch // p.pixels))
    else:
        rows = ring.index(stage * p.pitch + SHIFT)
        return reinterpret(rows, element(p), [p.kb, p.pixels], swizzled(p.kb, p.size, 2, True))


@gluon.jit
def opaque_zero(i):
    """A zero that the compiler does not see through: what is added to it is not hoisted out of the loop and spilt."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_launches(i):
    """The kernel begins before the launches ahead of it have ended: wait for what they write."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def round_to_tf32(v):
    """To TF32: wgmma would truncate; cuDNN rounds to nearest even."""
    return gl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [v], dtype=gl.float32, is_pure=True, pack=1)
