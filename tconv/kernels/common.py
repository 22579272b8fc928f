"""Device helpers shared by every kernel family.

Names.  A kernel gathers from a *source* and writes a *destination*: the input and the
output in the forward pass, the output's gradient and the input's in backward_input.
Axis quantities come in (depth, height, width) order; absent leading axes have size 1,
kernel 1, stride 1.  Every size and stride is a run-time scalar that is not specialised;
the constexprs are the specialisation classes (docs/design.md lists them).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if triton.knobs.runtime.interpret:  # where launches come one after the other

    def _nothing():
        pass

    gdc_launch_dependents = gdc_wait = _nothing

# Of two indices of which neither is known to be contiguous, Triton 3.6 gives neighbouring threads the first, later releases
# the last: pixels a stride apart, each in a sector of its own, are still better neighbours than channels.
FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


def kernel_name(base):
    """A name that says pass, layouts, dtype and tile, so that a profile reads itself."""

    def name(specialization):
        c, signature = specialization.constants, specialization.signature
        dtype = signature.get("src", signature.get("x", "*?")).lstrip("*")
        parts = [base]
        if "FORWARD" in c:
            parts.append("forward" if c["FORWARD"] else "backward_input")
        for key in ("SRC_LAYOUT", "DST_LAYOUT", "X_LAYOUT", "Y_LAYOUT"):
            parts.append(c.get(key, ""))
        parts.append(dtype)
        if "PRECISION" in c:
            parts.append(c["PRECISION"])
        parts.append("x".join(str(c[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BOX_W") if k in c))
        return "_".join(p for p in parts if p)

    return name


# The run-time scalars of the gather kernels and of the weight kernels: none is specialised.
GATHER_SCALARS = (
    "batch c_src c_dst d_src h_src w_src d_dst h_dst w_dst "
    "kd kh kw strided strideh stridew padd padh padw dild dilh dilw gcdd gcdh gcdw invd invh invw "
    "src_n src_c src_d src_h src_w dst_n dst_c dst_d dst_h dst_w"
).split()
WEIGHT_SCALARS = (
    "batch c_in c_out groups d_in h_in w_in d_out h_out w_out kd kh kw strided strideh stridew padd padh padw "
    "dild dilh dilw x_n x_c x_d x_h x_w y_n y_c y_d y_h y_w per_split"
).split()


@triton.jit
def axis_taps(phase, kernel, stride, padding, dilation, gcd, inverse, FORWARD: tl.constexpr):
    """The taps that reach one phase of one axis, as (first tap, tap step, count, source offset, source step).

    Destination q of the phase reads source q*multiple + offset + j*source_step through tap
    first + j*tap_step, for j < count, where multiple is 1 forward and the stride backward.
    """
    if FORWARD:
        # d*k = a + p (mod s) has a solution only where g = gcd(s, d) divides a + p (geometry.Axis).
        t = phase + padding
        tap_step = stride // gcd
        first = ((t // gcd).to(tl.int64) * inverse % tap_step).to(tl.int32)
        count = tl.where((t % gcd == 0) & (first < kernel), (kernel - first + tap_step - 1) // tap_step, 0)
        return first, tap_step, count, (t - dilation * first) // stride, -(dilation // gcd)
    else:
        # grad_input[i] = sum over k of grad_output[i*s - p + d*k] * weight[k]
        return 0, 1, kernel, -padding, dilation


@triton.jit
def known_strides(n, c, d, h, w, LAYOUT: tl.constexpr):
    """Strides with what the layout says of them spelt out for the compiler.  LAYOUT is one of
    strided   any strides;
    width     pixels along the width are contiguous;
    channels  channels are contiguous;
    vectors   channels are contiguous and the other strides whole 16-element vectors (and so are the channels of
              a group).  Spelt as arithmetic, since the compiler drops tl.multiple_of on a kernel's argument.
    """
    if LAYOUT == "width":
        return n, c, d, h, 1
    elif LAYOUT == "channels":
        return n, 1, d, h, w
    elif LAYOUT == "vectors":
        return n // 16 * 16, 1, d // 16 * 16, h // 16 * 16, w // 16 * 16
    else:
        return n, c, d, h, w


@triton.jit
def divisible(along, n, c, d, h, BY: tl.constexpr):
    """A number of neighbours and four strides, which the compiler then knows to be multiples of BY: so many elements are one access."""
    return along // BY * BY, n // BY * BY, c // BY * BY, d // BY * BY, h // BY * BY


@triton.jit
def known_channels(c, LAYOUT: tl.constexpr):
    """The channels of a group, a multiple of 16 where the layout says so."""
    if LAYOUT == "vectors":
        return c // 16 * 16
    else:
        return c


@triton.jit
def split_row(row, d_size, h_size):
    """(n, d, h) of a flattened row index: a row is one line of pixels along the width."""
    h = row % h_size
    nd = row // h_size
    return nd // d_size, nd % d_size, h


@triton.jit
def split_tap(t, count_h, count_w):
    """(jd, jh, jw) of a phase's tap t.  A phase without taps divides by 1: LLVM takes a division by zero, moved ahead of a
    loop without steps, as proof that there are steps."""
    count_h = tl.maximum(count_h, 1)
    count_w = tl.maximum(count_w, 1)
    return t // count_w // count_h, t // count_w % count_h, t % count_w


@triton.jit
def inside(i, size):
    """0 <= i < size in one unsigned comparison."""
    return i.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit
def round_tf32(v):
    """fp32 rounded to the nearest TF32 value, ties to even, as cuDNN rounds its operands.

    The tensor core would truncate, which moves a model's outputs by 1e-3 instead of 1e-5.
    Integer arithmetic gives the same bits on every GPU and in the interpreter.
    """
    u = v.to(tl.uint32, bitcast=True)
    rounded = (u + 0xFFF + ((u >> 13) & 1)) & 0xFFFFE000
    # A NaN must stay one: the addition could carry out of its mantissa.
    u = tl.where(v != v, u | 0x00400000, rounded)
    return u.to(tl.float32, bitcast=True)


@triton.jit
def split_tf32(v):
    """fp32 as two TF32 values whose sum it is to 22 bits.

    What TF32 cannot hold as a finite value is the second alone: an infinite first one would make a NaN of itself and the
    other operand's second, where that is zero or of the other sign.
    """
    high = round_tf32(v)
    finite = tl.abs(high) < float("inf")
    high = tl.where(finite, high, 0.0)
    return high, tl.where(finite, round_tf32(v - high), v)


@triton.jit
def load_tile(base, pixel, channel, mask, LAYOUT: tl.constexpr):
    """A [pixels, channels] tile; loaded so that neighbouring threads touch neighbouring addresses, or pixels where neither axis
    is known to be contiguous."""
    if LAYOUT == "channels" or LAYOUT == "vectors" or FIRST:
        return tl.load(base + (pixel[:, None] + channel[None, :]), mask=mask, other=0.0)
    else:
        return tl.trans(tl.load(base + (channel[:, None] + pixel[None, :]), mask=tl.trans(mask), other=0.0))


@triton.jit
def store_tile(base, pixel, channel, value, mask, LAYOUT: tl.constexpr):
    """The counterpart of load_tile; converts to the destination's dtype."""
    value = value.to(base.dtype.element_ty)
    if LAYOUT == "channels" or LAYOUT == "vectors" or FIRST:
        tl.store(base + (pixel[:, None] + channel[None, :]), value, mask=mask)
    else:
        tl.store(base + (channel[:, None] + pixel[None, :]), tl.trans(value), mask=tl.trans(mask))


@triton.jit
def widen(v, DTYPE: tl.constexpr):
    """v as fp32 or float64; bf16 in two steps, since the interpreter reads its bits wrongly in one."""
    if v.dtype == tl.bfloat16:
        v = v.to(tl.float32)
    return v.to(DTYPE)


@triton.jit
def narrow(v, DTYPE: tl.constexpr):
    """A float64 sum as DTYPE; to 16 bits in two steps, since the interpreter has no such conversion in one."""
    if DTYPE != tl.float64:
        v = v.to(tl.float32)
    return v.to(DTYPE)


@triton.jit
def operand(v, PRECISION: tl.constexpr):
    """A matrix operand as the tensor core should see it at this precision."""
    if PRECISION == "tf32":
        v = round_tf32(v)
    elif PRECISION == "widen":
        v = v.to(tl.float32)
    return v


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b.  PRECISION is one of
    half    fp16 or bf16 operands, fp32 accumulation;
    tf32    fp32 operands already rounded to TF32;
    tf32x3  fp32 as three TF32 products (more accurate than an fp32 multiply-add chain);
    ieee    fp32 (or, in the interpreter, fp64) multiply-add;
    widen   the interpreter's bf16, which NumPy has not: operands widened to fp32.
    """
    if PRECISION == "tf32":
        return tl.dot(a, b, acc, input_precision="tf32")
    elif PRECISION == "tf32x3":
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
