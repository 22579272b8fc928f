"""Whole configurations drawn at random: forward and all gradients against the fp64 oracle.

The bound is rigorous, element by element, so that no draw fails by chance: a sum of n products formed in any order
errs by at most n units of rounding of the sum of their absolute values, and its result is rounded once more.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import ATEN, oracle, passes, round_tf32
from samples import TCONV

from tconv import dispatch, record

NAMES = ("forward", "backward_input", "backward_weight", "backward_bias")
GPU = torch.cuda.is_available()
# float64 runs on the kernels in the interpreter alone.
PRECISIONS = ("ieee", "tf32", "float16", "bfloat16") if GPU else ("float64", "ieee", "tf32", "float16", "bfloat16")
# Groups and channels of a group: dense layers, wide groups (both on the GEMM kernels), and the direct kernels' own.
KINDS = {
    "dense": ((1,), (1, 2, 3, 5, 8, 16, 17, 33)),
    "grouped": ((2, 3), (3, 5, 8, 16, 17)),
    "direct": ((2, 3, 5), (1, 2, 3, 4)),
}
# By the number of axes: largest input size, kernel, stride, dilation and padding of an axis.
LIMITS = {1: (9, 7, 6, 6, 6), 2: (4, 4, 4, 4, 5), 3: (3, 3, 2, 2, 3)}


def contiguous(t):
    return t


def channels_last(t):
    """Dimension 1, or the channels of an unbatched input at dimension 0, is the fastest."""
    return t.movedim(-t.ndim + 1, -1).contiguous().movedim(-1, -t.ndim + 1)


def permuted(t):
    """All dimensions in reverse order."""
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


def expanded(t):
    """Stride 0 along the first dimension."""
    return t[:1].expand_as(t)


def sliced(t):
    """Every other element of a larger tensor, from an offset on; NaN between."""
    larger = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)
    view = larger[..., 3::2]
    return view.copy_(t)


LAYOUTS = (contiguous, channels_last, permuted, expanded, sliced)


@dataclass(frozen=True)
class Configuration:
    batch: int | None  # None: unbatched
    channels: tuple[int, int]  # of a group, in and out
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    layer: dict
    bias: bool
    precision: str
    layouts: tuple  # of input, weight and grad_output

    @property
    def ndim(self):
        return len(self.kernel)

    def tensors(self, device):
        """Random (input, weight, bias, grad_output)."""
        dtype = getattr(torch, self.precision, torch.float32)

        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64).to(device, dtype)

        (c_in, c_out), g = self.channels, self.layer["groups"]
        batch = () if self.batch is None else (self.batch,)
        input, weight = draw(*batch, c_in * g, *self.size), draw(c_in * g, c_out, *self.kernel)
        grad_output = draw(*ATEN[self.ndim](input.to("meta"), weight.to("meta"), **self.layer).shape)
        input, weight, grad_output = (f(t) for f, t in zip(self.layouts, (input, weight, grad_output), strict=True))
        return input, weight, draw(c_out * g) if self.bias else None, grad_output


@st.composite
def configurations(draw):
    """Every draw is valid: no filter, no assumption."""
    ndim = draw(st.integers(1, 3), label="ndim")
    most_size, most_kernel, most_stride, most_dilation, most_padding = LIMITS[ndim]
    groups, widths = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    channels = draw(st.sampled_from(widths)), draw(st.sampled_from(widths))
    axes = []
    for _ in range(ndim):
        size, kernel, stride, dilation = (
            draw(st.integers(1, most)) for most in (most_size, most_kernel, most_stride, most_dilation)
        )
        output_padding = draw(st.integers(0, max(stride, dilation) - 1))
        unpadded = (size - 1) * stride + dilation * (kernel - 1) + output_padding + 1
        padding = draw(st.integers(0, min(most_padding, (unpadded - 1) // 2)))
        axes.append((size, kernel, stride, padding, output_padding, dilation))
    size, kernel, stride, padding, output_padding, dilation = zip(*axes, strict=True)
    return Configuration(
        batch=draw(st.sampled_from((None, 0, 1, 2, 3))),
        channels=channels,
        size=size,
        kernel=kernel,
        layer=dict(
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=draw(st.sampled_from(groups)),
            dilation=dilation,
        ),
        bias=draw(st.booleans()),
        precision=draw(st.sampled_from(PRECISIONS)),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
    )


@settings(
    max_examples=200 if GPU else 40,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(configuration=configurations())
def test_against_the_oracle(configuration, device):
    c = configuration
    torch.backends.cudnn.conv.fp32_precision = "tf32" if c.precision == "tf32" else "ieee"
    tensors = c.tensors(device)
    ran = {}  # by pass; what explain() says of a gradient is for a grad_output that lies as the output does
    plan = dispatch.plan

    def note(problem, target):
        return ran.setdefault(problem.direction, plan(problem, target))

    record.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "plan", note)
        actual = passes(TCONV[c.ndim], *tensors, **c.layer)
    assert len(ran) == (0 if c.batch == 0 else 3)
    assert all(plan.family in ("few", "columns", "grid", "gemm", "direct") for plan in ran.values()), ran
    exact = oracle(c.ndim, *tensors, **c.layer)
    magnitude = oracle(c.ndim, *(None if t is None else t.abs() for t in tensors), **c.layer)
    input, weight, bias, grad_output = tensors
    if c.precision == "tf32":
        operands = round_tf32(input), round_tf32(weight), bias, round_tf32(grad_output)
        rounded = oracle(c.ndim, *operands, **c.layer)
    taps, in_channels, out_channels = weight[0, 0].numel(), *c.channels
    # How many terms one element of each result sums, at most.
    terms = (
        in_channels * taps + 1,
        out_channels * taps,
        input.numel() // weight.shape[0],
        grad_output.numel() // (out_channels * c.layer["groups"]),
    )
    unit = torch.finfo(torch.float64 if c.precision == "float64" else torch.float32).eps
    for i in range(3 + c.bias):
        name, a, m = NAMES[i], actual[i], magnitude[i]
        assert a.dtype is input.dtype and a.shape == m.shape, f"{name}: {a.dtype} {a.shape}, expected {m.shape}"
        e = rounded[i] if i < 3 and c.batch != 0 and ran[name].precision == "tf32" else exact[i]
        # 8: three TF32 products in place of one IEEE product.
        bound = (terms[i] + 8) * unit * m + torch.finfo(a.dtype).eps * e.abs() + torch.finfo(a.dtype).tiny
        off = ~((a.double() - e).abs() <= bound)
        assert not off.any(), f"{name}: {int(off.sum())} of {a.numel()} elements off, as {a[off][0]} for {e[off][0]}"
