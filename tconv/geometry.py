"""The integer geometry of a transposed convolution: arguments, sizes, phases and taps.

Pure Python integers (sizes may be symbolic), no tensors.  Everything downstream
trusts arguments that have passed `check`.

A transposed convolution of stride s, padding p and dilation d sends input i through
tap k to output o = i*s - p + d*k.  Read from the output's side, o receives tap k from
i = (o + p - d*k) / s when that is a whole number inside the input.  Which taps qualify
depends on o only through its *phase* o mod s, so the outputs split into s phases per
axis, each an ordinary stride-1 gather over its own taps: no product with an inserted
zero is ever formed (docs/arithmetic.md has the derivation and a figure).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod


@dataclass(frozen=True)
class Axis:
    """One spatial axis, in the form that the kernels take.

    Outputs of phase a use taps first + j*tap_step; with g = gcd(stride, dilation) the
    congruence d*k = a + p (mod s) has a solution only where g divides a + p, and then
    k = ((a + p) / g) * inverse (mod s / g).
    """

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def gcd(self) -> int:
        return gcd(self.stride, self.dilation)

    @property
    def inverse(self) -> int:
        """The inverse of dilation/gcd modulo stride/gcd (0 where the modulus is 1)."""
        modulus = self.stride // self.gcd
        return pow(self.dilation // self.gcd, -1, modulus) if modulus > 1 else 0

    def taps(self, phase: int) -> list[tuple[int, int]]:
        """(tap k, input offset) pairs of one phase: output q*stride + phase reads input q + offset."""
        s, d, g = self.stride, self.dilation, self.gcd
        t = phase + self.padding
        if t % g:
            return []
        first = (t // g * self.inverse) % (s // g)
        return [(k, (t - d * k) // s) for k in range(first, self.kernel, s // g)]

    @property
    def most_taps(self) -> int:
        """How many taps a phase has, at most."""
        return -(-self.kernel // (self.stride // self.gcd))

    def output_size(self, size: int, output_padding: int) -> int:
        """Output length for an input of `size`, by torch.nn.ConvTranspose1d's formula
        (relation 14 of Dumoulin and Visin, "A guide to convolution arithmetic for deep learning",
        with dilation and output_padding)."""
        return (size - 1) * self.stride - 2 * self.padding + self.dilation * (self.kernel - 1) + output_padding + 1


def sizes3(size) -> tuple[int, ...]:
    """A spatial size as (depth, height, width)."""
    return (1,) * (3 - len(size)) + tuple(size)


@dataclass(frozen=True)
class Geometry:
    """A transposed convolution's hyper-parameters, one entry per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.kernel)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(map(Axis, self.kernel, self.stride, self.padding, self.dilation))

    @property
    def axes3(self) -> tuple[Axis, ...]:
        """The axes as (depth, height, width), absent leading ones as kernel 1, stride 1."""
        return (Axis(1, 1, 0, 1),) * (3 - self.ndim) + self.axes

    @property
    def taps(self) -> int:
        return prod(self.kernel)

    @property
    def layer(self) -> tuple:
        """stride, padding, output_padding, groups and dilation, as the operators take them."""
        return self.stride, self.padding, self.output_padding, self.groups, self.dilation

    def output_size(self, input_size) -> tuple[int, ...]:
        """Spatial output size for a spatial input size (ints or symbolic ints)."""
        return tuple(a.output_size(i, op) for a, i, op in zip(self.axes, input_size, self.output_padding))

    def describe(self) -> str:
        def short(name, values, default):
            if all(v == default for v in values):
                return ""
            text = str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
            return f" {name}{text}"

        return (
            short("k", self.kernel, None)
            + short("s", self.stride, 1)
            + short("p", self.padding, 0)
            + short("op", self.output_padding, 0)
            + short("d", self.dilation, 1)
            + short("g", (self.groups,), 1)
        ).strip()


@lru_cache(maxsize=4096)
def make_geometry(kernel, stride, padding, output_padding, groups, dilation) -> Geometry:
    """The cached object for arguments that `check` has passed."""
    return Geometry(kernel, stride, padding, output_padding, groups, dilation)


def check(ndim, input_shape, weight_shape, bias_shape, stride, padding, output_padding, groups, dilation) -> None:
    """Raise RuntimeError (torch's type for these) when the arguments do not make a transposed convolution.

    Shapes are those of a batched input (N, in_channels, *spatial), a weight
    (in_channels, out_channels / groups, *kernel) and a bias (out_channels,) or None;
    the hyper-parameters are tuples of `ndim` ints.  The size of the output is checked too.
    """

    def fail(text):
        raise RuntimeError(f"conv_transpose{ndim}d(): {text}")

    if len(weight_shape) != ndim + 2:
        fail(
            f"expected weight of {ndim + 2} dimensions (in_channels, out_channels/groups, *kernel_size), "
            f"got weight of size {list(weight_shape)}"
        )
    if groups <= 0:
        fail(f"expected groups to be positive, got groups={groups}")
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("output_padding", output_padding, 0),
        ("dilation", dilation, 1),
    ):
        if any(v < least for v in values):
            kind = "positive" if least else "non-negative"
            fail(f"expected {name} to be {kind}, got {name}={list(values)}")
    for op, s, d in zip(output_padding, stride, dilation):
        if op >= s and op >= d:
            fail(
                "expected output_padding to be smaller than either stride or dilation, got "
                f"output_padding={list(output_padding)}, stride={list(stride)}, dilation={list(dilation)}"
            )
    c_in, c_group = weight_shape[0], weight_shape[1]
    if any(k < 1 for k in weight_shape[2:]) or c_in < 1:
        fail(
            f"expected weight to have input channels and a kernel of at least 1, got weight of size {list(weight_shape)}"
        )
    if c_in % groups:
        fail(
            f"expected weight to be divisible by groups={groups} at dimension 0, got weight of size {list(weight_shape)}"
        )
    if input_shape[1] != c_in:
        fail(
            f"given weight of size {list(weight_shape)}, expected input{list(input_shape)} "
            f"to have {c_in} channels, got {input_shape[1]} channels"
        )
    if any(i < 1 for i in input_shape[2:]):
        fail(f"expected every spatial dimension of input to be at least 1, got input of size {list(input_shape)}")
    if bias_shape is not None and tuple(bias_shape) != (c_group * groups,):
        fail(
            f"given weight of size {list(weight_shape)} and groups={groups}, expected bias to be 1-dimensional "
            f"with {c_group * groups} elements, got bias of size {list(bias_shape)}"
        )
    out = [
        Axis(k, s, p, d).output_size(i, op)
        for i, k, s, p, op, d in zip(input_shape[2:], weight_shape[2:], stride, padding, output_padding, dilation)
    ]
    if any(o < 0 for o in out):
        fail(
            f"given input of spatial size {list(input_shape[2:])}, kernel {list(weight_shape[2:])} and "
            f"padding={list(padding)}, the calculated output size {out} is negative: padding is too large"
        )


check_cached = lru_cache(maxsize=4096)(check)
