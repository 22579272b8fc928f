"""What is measured: suites of layers, a layer's description in words, its classes, its operations and bytes.

Plain integers; nothing here touches a device.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from math import prod

from ..configs import cdiv
from ..geometry import Axis, Geometry, check
from ..workloads import Layer, layers

PASSES = ("forward", "backward_input", "backward_weight", "training")
PRECISIONS = ("tf32", "fp32", "fp16", "bf16")
FORMATS = ("contiguous", "channels_last")
CLASSES: tuple[str, ...] = (
    "kernel = 2 x stride",
    "kernel = stride",
    "stride 1",
    "other strided",
    "depthwise",
    "grouped",
)
CLASSES += ("few output channels", "1-d", "2-d", "3-d")
FEW_CHANNELS = 8  # a tensor-core tile has at least 8 columns

SUITES = ("core", "kernelbench", "kernelbench-problems", "zoo")

# What `core` takes from the two collections: every class, and sizes that are checked and measured in under a second.
CORE = """
    L2/91 DCGAN/g1 DCGAN/g3 pix2pix-unet256/mid8 SimpleBaseline-R50/deconv3 HTDemucs-freq/fdec128
    L3/45.1 UNet-2D/up64 SAM/up2 MaskRCNN-head/deconv PointPillars-KITTI/deblock_s4
    L2/11 DCVC-TCM/mv_prior_stride1
    L2/36 L1/81 StyleGAN2-1024/conv0_b128 CompressAI-ScaleHyperprior/g_s64
    DCGAN/g4 RIFE/lastconv90 FCN-8s/upscore8
    L1/75 StyleGAN2-1024/conv0_b128_fused_modconv
    CenterNet-DLA34/ida_up64 EDM-ADM-ImageNet64/up32 BigVGAN-v2-24k/antialias_up_c192 MedNeXt-L-k5/up_dw32
    HiFiGAN-V1/ups0_train HiFiGAN-V1/ups2_infer DAC-44k/up0_train EnCodec-24k/up2 ConvTasNet-decoder/decoder L1/79
    nnUNet-3d_fullres/tu32 PSMNet/conv6 L2/15 L1/58
"""

_EXAMPLE = '"convtranspose2d 256 128 k4 s2 p1 @ 16x256x32x32"'
_OPTIONS = {"k": "kernel", "s": "stride", "p": "padding", "op": "output_padding", "d": "dilation", "g": "groups"}


@dataclass(frozen=True)
class Case:
    """One layer of a suite, or one whole KernelBench problem (`problem` is then its name)."""

    suite: str
    name: str
    layers: tuple[Layer, ...]
    problem: str = ""
    # Elements that a whole problem must read and write besides its layers' weights; None for a layer.
    elements: int | None = None

    @property
    def layer(self) -> Layer:
        return self.layers[0]

    @property
    def description(self) -> str:
        if self.problem:
            return _problems()[self.problem]["title"]
        return describe(self.layer)

    def flops(self, pass_name: str) -> int:
        """Floating-point operations that count: two for each product whose output exists (docs/arithmetic.md)."""
        return sum(_flops(layer) for layer in self.layers) * (3 if pass_name == "training" else 1)

    def bytes(self, pass_name: str, element_size: int) -> int:
        """Bytes that must move: each of a pass's three tensors once; a training step is its three passes."""
        elements = sum(prod(layer.weight_shape) for layer in self.layers)
        elements += sum(layer.elements for layer in self.layers) if self.elements is None else self.elements
        return elements * element_size * (3 if pass_name == "training" else 1)

    @property
    def check_bytes(self) -> int:
        """About the most memory that the comparison with the float64 oracle holds at once, workspaces left out."""
        largest = max(max(prod(layer.input_shape), prod(layer.output_shape)) for layer in self.layers)
        # fp64: operands and results; fp32: the draw, its copy at the precision, results; the difference and its square.
        held = (8 * 2 + 4 * 3) * self._held() + 8 * 3 * largest
        return held + 8 * 3 * (self.elements or 0)

    def _held(self) -> int:
        return sum(layer.elements + prod(layer.weight_shape) for layer in self.layers)


def axis_pairs(axis: Axis, size: int, output_padding: int) -> int:
    """How many (input, tap) pairs of one axis have an output."""
    out = axis.output_size(size, output_padding)
    pairs = 0
    for k in range(axis.kernel):
        shift = axis.dilation * k - axis.padding  # output = input * stride + shift, from 0 to out - 1
        first = max(0, -(shift // axis.stride))
        last = min(size - 1, (out - 1 - shift) // axis.stride)
        pairs += max(0, last - first + 1)
    return pairs


def _flops(layer: Layer) -> int:
    g = layer.geometry
    pairs = prod(axis_pairs(a, i, op) for a, i, op in zip(g.axes, layer.input_shape[2:], g.output_padding))
    return 2 * layer.input_shape[0] * layer.in_channels * (layer.out_channels // g.groups) * pairs


def classes(layer: Layer) -> tuple[str, ...]:
    """The classes that a layer counts in: one of the first four by its kernel and stride, and those that apply."""
    g = layer.geometry
    strided = [(k, s) for k, s in zip(g.kernel, g.stride) if s > 1]
    # An axis with stride 1 and kernel 1 has no say: k1x2x2 s1x2x2 is kernel = stride.
    plain = all(k == 1 for k, s in zip(g.kernel, g.stride) if s == 1) and all(d == 1 for d in g.dilation)
    if not strided:
        found = ["stride 1"]
    elif plain and all(k == 2 * s for k, s in strided):
        found = ["kernel = 2 x stride"]
    elif plain and all(k == s for k, s in strided):
        found = ["kernel = stride"]
    else:
        found = ["other strided"]
    if g.groups > 1:
        found.append("depthwise" if layer.in_channels == g.groups else "grouped")
    if layer.out_channels <= FEW_CHANNELS:
        found.append("few output channels")
    return (*found, f"{g.ndim}-d")


def describe(layer: Layer) -> str:
    """A layer in the words that `parse_layer` reads."""
    g = layer.geometry
    shape = "x".join(map(str, layer.input_shape))
    bias = "" if layer.bias else " nobias"
    return f"convtranspose{g.ndim}d {layer.in_channels} {layer.out_channels} {g.describe()}{bias} @ {shape}"


def parse_layer(text: str) -> Layer:
    """The layer that a description such as "convtranspose2d 256 128 k4 s2 p1 @ 16x256x32x32" names.

    Words: input channels, output channels, k (kernel, required), s, p, op, d, g as torch's arguments with torch's
    defaults, one number or one an axis (k3x5); `nobias` for no bias; after @ the input, batch first.
    Raises ValueError saying what is wrong with it.
    """

    def fail(what: str):
        raise ValueError(f"bad layer description {text!r}: {what}; an example is {_EXAMPLE}")

    head, at, shape_text = text.strip().lower().partition("@")
    words = head.split()
    kind = re.fullmatch(r"conv_?transpose([123])d", words[0]) if words else None
    if kind is None:
        fail("it starts with none of convtranspose1d, convtranspose2d, convtranspose3d")
    assert kind is not None
    ndim = int(kind[1])
    if not at:
        fail("the input's size after @ is missing")
    if not re.fullmatch(r"\d+(x\d+)*", shape_text.strip()):
        fail(f"expected an input size such as {'x'.join(['16'] * (ndim + 2))} after @, got {shape_text.strip()!r}")
    shape = tuple(map(int, shape_text.split("x")))
    if len(shape) != ndim + 2:
        fail(f"expected {ndim + 2} input sizes (batch, channels, {ndim} spatial), got {len(shape)}")
    if len(words) < 3 or not all(w.isdecimal() for w in words[1:3]):
        fail("expected the numbers of input and output channels after the first word")
    c_in, c_out = int(words[1]), int(words[2])
    values = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    given: dict[str, tuple[int, ...]] = {n: (v,) * (1 if n == "groups" else ndim) for n, v in values.items()}
    bias = True
    seen = set()
    for word in words[3:]:
        if word in ("bias", "nobias"):
            bias = word == "bias"
            continue
        match = re.fullmatch(r"(k|s|p|op|d|g)(\d+(?:x\d+)*)", word)
        if match is None:
            fail(f"{word!r} is none of k, s, p, op, d, g with numbers, or nobias")
        assert match is not None
        name, numbers = _OPTIONS[match[1]], tuple(map(int, match[2].split("x")))
        if name in seen:
            fail(f"{match[1]} is given twice")
        seen.add(name)
        wanted = 1 if name == "groups" else ndim
        if len(numbers) == 1:
            numbers *= wanted
        if len(numbers) != wanted:
            fail(f"{word!r} has {len(numbers)} numbers, expected 1" + (f" or {wanted}" if wanted > 1 else ""))
        given[name] = numbers
    if "kernel" not in given:
        fail("the kernel (k) is missing")
    groups = given.pop("groups")[0]
    if shape[1] != c_in:
        fail(f"the input has {shape[1]} channels, the layer takes {c_in}")
    if shape[0] < 1 or c_in < 1 or c_out < 1:
        fail("batch and channels must be at least 1")
    if groups < 1 or c_out % groups:
        fail(f"groups {groups} does not divide {c_out} output channels")
    geometry = Geometry(groups=groups, **given)
    layer = Layer(text, "the command line", geometry, c_in, c_out, bias, shape)
    try:
        check(ndim, shape, layer.weight_shape, (c_out,) if bias else None, *geometry.layer)
    except RuntimeError as error:
        fail(str(error))
    if min(layer.output_shape) < 1:
        fail(f"its output has size {'x'.join(map(str, layer.output_shape))}, which is empty")
    return replace(layer, name=describe(layer))


@cache
def suite(name: str) -> tuple[Case, ...]:
    """The cases of a suite.  Raises ValueError for an unknown one."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}, expected one of {', '.join(SUITES)}")
    if name == "core":
        known = {layer.name: layer for source in ("kernelbench", "zoo") for layer in layers(source)}
        return tuple(Case(name, n, (known[n],)) for n in CORE.split())
    if name == "kernelbench-problems":
        return tuple(_problem(p) for p in _problems().values() if p["ops_after_conv"])
    return tuple(Case(name, layer.name, (layer,)) for layer in layers(name))


def find(suite_name: str, name: str) -> Case:
    """One case by its suite and name; suite "layer" takes a description."""
    if suite_name == "layer":
        return Case("layer", name, (parse_layer(name),))
    return next(case for case in suite(suite_name) if case.name == name)


@cache
def _problems() -> dict[str, dict]:
    data = json.loads((resources.files("tconv") / "data" / "kernelbench.json").read_text())
    return {p["name"]: p for p in data["problems"]}


def _problem(p: dict) -> Case:
    own = tuple(layer for layer in layers("kernelbench") if layer.name.split(".")[0] == p["name"])
    # What a problem must move at least: its inputs.  Its output is small, or as large as the layer's at most, and
    # which of the two follows from its operations; it is left out, so that the roof stays a lower bound.
    elements = sum(prod(s) for s in p["model_input_shapes"])
    return Case("kernelbench-problems", p["name"], own, p["name"], elements)


def shrink(layer: Layer) -> Layer:
    """A layer of the same kernel, stride and class, small enough for Triton's interpreter."""
    g = layer.geometry
    of_group = layer.out_channels // g.groups
    many = FEW_CHANNELS + 1  # output channels, where the layer has so many: few are a class of their own
    groups = min(g.groups, max(2, cdiv(many, of_group)))
    c_in, c_out = groups * min(layer.in_channels // g.groups, 5), groups * min(of_group, cdiv(many, groups))
    size = [min(i, 3 if g.ndim == 3 else 5) for i in layer.input_shape[2:]]
    for axis, a in enumerate(g.axes):  # a size that padding leaves something of
        while size[axis] < layer.input_shape[2 + axis] and a.output_size(size[axis], g.output_padding[axis]) < 1:
            size[axis] += 1
    shape = (min(layer.input_shape[0], 2), c_in, *size)
    return replace(layer, geometry=replace(g, groups=groups), in_channels=c_in, out_channels=c_out, input_shape=shape)
