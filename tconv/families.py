"""The kernel families: whether each takes a pass, with which configuration, and why or why not.

FAMILIES has them in the order in which `dispatch.plan` asks; the last takes what is left.  Each returns a Plan, or the reason
why it does not take the pass, empty where that needs no mention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch

from . import blocks, columns, configs, few, grid, long, patches, rows, shift
from .configs import Target, cdiv, power_of_two
from .geometry import sizes3
from .problem import HALF, TF32_PRODUCTS, Plan, Problem


@dataclass(frozen=True)
class Asked:
    """What a family is asked: a problem on a target, and what those before it have said."""

    problem: Problem
    target: Target
    how: str  # the PRECISION of kernels.common.matmul, for kernels that leave it open
    why: str  # the layer's channels, and why other families do not take it

    def without(self, family: str) -> bool:
        return family in self.target.without


# What is left to aten, and why: the time of the kernels that every GPU runs over cuDNN's.  Gradients: on an H100 and an H200,
# geometric means over core; in IEEE fp32 inputs' are level, but for depthwise ones (and over half of the
# zoo under Triton 3.9, 0.95 in NCHW, 1.45 times cuDNN's speed in channels_last); so are depthwise weights'.  Forward:
# groups that the shift kernel does not take: StyleGAN2's 8 of 512 to 256 channels (16 bits 1.7 to 2.1, TF32 1.7 and 2.1),
# and in 16 bits, channels_last, L1/72 and L1/75 (8 to 16 channels, 2.2 and 1.5; 0.3 to 0.6 in NCHW, and in TF32); and products
# of contiguous matrices, where the block kernel does not take them: k1 of PointPillars, SECOND, CenterPoint and BEVFusion (64 to 128 and 128 to 256 channels, 16 bits 1.2
# to 1.6, TF32 0.97 to 1.36; 0.4 in IEEE fp32); and many images of at most 6x6 pixels in
# channels_last whose taps overlap, since a tile has zeros between them: DreamerV3's 4x4 1.5 and 1.6, Wav2Lip's 6x6 1.0 in bf16 and
# 1.25 at TF32 (its 3x3 and DCGAN's 4x4, of 1152 and 1024 pixels, 0.8 to 1.1; 8x8 0.8 to 1.05, and 0.5 for SimpleBaseline's long sums
# at TF32).  Not FSRCNN's (56 to 1 channel, k9) at TF32, although torch is faster: what is deterministic took up to six times as long.
LEFT = {
    "groups": "cuDNN measured 1.5 to 2.2 times faster with such groups on an H200",
    "images": "cuDNN measured up to 1.6 times faster with images so small in channels_last on an H200",
    "sums": "cuDNN measured up to 1.3 times faster with sums so long in channels_last on an H200",
    "product": "cuDNN measured up to 1.6 times faster with a kernel of 1 on contiguous tensors on an H200",
    "backward_input": "cuDNN's gradient measured 2.5 times faster on Hopper GPUs",
    "ieee_input": "cuDNN's gradient measured up to 5 times faster in IEEE fp32 on an H200",
    "backward_weight": "cuDNN's gradient measured 3.4 times faster on Hopper GPUs",
}
# cuDNN's deterministic TF32 weight gradients may add all their products in one chain, in which the tensor core truncates: with
# 262,144 of them (L2/77) the error was 6.8e-4 in root mean square, with 524,288 (L2/78) 1.2e-3, where rounded operands and an
# exact sum have 3e-4.  So those of copies get parts of the batch of about so many products, and the parts are added in fp32; what has a
# batch of few large images keeps long chains.  Not in 16 bits: each part would be rounded, which costs what the chain costs.
LEFT_PRODUCTS, MOST_LEFT_PARTS = 1 << 16, 16
LEFT_READ = 64  # products for each element of an output's gradient
# With fewer channels, at TF32, cuDNN takes contiguous tensors as they lie in less time than copies and channels_last take: over
# kernelbench's weights' gradients 0.6 to 1.0 times theirs, from 64 on 0.83 to 1.3.
LEFT_CHANNELS = 64
# Inputs' gradients in IEEE fp32 (the portable kernel's speed over cuDNN's), 2-d: 0.2 to 0.7 where most of a tile's depth is padding (1,
# 3, 9 and 17 output channels); in NCHW 0.6 to 1.1 with taps that do not overlap, and 0.4 to 0.9 with those that do, but for small ones;
# of a channels_last copy 1.0 to 1.6 from 128 output channels on, below 0.5 to 0.9.  3-d, NCHW: 0.5 to 0.9 with taps that do not overlap
# (1.0 to 3.4 for small ones, and 1.15 for UNETR's 16 channels), 0.8 to 2 with those that do, and of a copy 0.8 to 1.2 times that.
# 1-d 0.86 to 1.7.
MOSTLY_PADDING, IEEE_INPUT_PRODUCTS, IEEE_INPUT_CHANNELS = 1.75, 3 << 29, 128
# Weights' gradients in IEEE fp32: 0.41 of cuDNN's speed in NCHW, 0.77 in channels_last, over half of the zoo.  cuDNN's deterministic
# algorithms are no way out: half of its results had twice the error of its free choice and more, and small ones took up to seven times as
# long.  By the times in channels_last, copies take NCHW to 0.74; with fewer channels they lose.
IEEE_WEIGHT_CHANNELS = 32
IEEE_WEIGHT_READ = (
    32  # products for each element of the output's gradient; of k1 s2 or k3 s5 most of it would be copied for nothing
)
# In 16 bits and channels_last, without a bias (cuDNN's time over the shift kernel's): k4 s2 and k3 s2 of 512 to 2048 channels 0.81 to 1.08
# (nine layers of 1024 pixels and more, geometric mean 0.93; 1.04 and 1.05 of 256 and 64 pixels), k3x5 and 3-d k3 of 64 to 128 channels 0.79 and 0.88; with a bias torch adds a pass.
LONG_SUMS, WIDE_OUTPUTS = 512, 128
SMALL_IMAGE, MANY_PIXELS = 36, 4096  # pixels of an image, and of a batch that fills a GPU


def _may_leave(asked: Asked) -> bool:
    return asked.target.backend == "cuda" and not asked.without("aten") and not asked.problem.large


def _one_product(p: Problem) -> bool:
    """Whether a pass multiplies two matrices."""
    g = p.geometry
    return g.groups == g.taps == max(g.stride) == 1 and not any(g.padding)


def left_product(asked: Asked) -> Plan | str:
    """Forward passes that multiply two matrices as they lie are left to aten."""
    p = asked.problem
    if not _may_leave(asked) or p.direction != "forward" or not _one_product(p):
        return ""
    if not (p.source == p.destination == "width" and p.dense):
        return ""
    left = min(p.channels) >= shift.WIDE and (p.dtype in HALF or asked.how == "tf32")
    return Plan("aten", LEFT["product"]) if left else ""


def left_images(asked: Asked) -> Plan | str:
    """Forward passes of many small images in channels_last are left to aten."""
    p, g = asked.problem, asked.problem.geometry
    if (
        not _may_leave(asked)
        or p.direction != "forward"
        or g.groups > 1
        or not p.channels_last
        or p.destination == "width"
    ):
        return ""
    if prod(p.input_size) > SMALL_IMAGE or p.pixels < MANY_PIXELS or min(p.channels) < shift.WIDE:
        return ""
    overlap = max(g.stride) > 1 and any(a.kernel > a.stride for a in g.axes)
    return Plan("aten", LEFT["images"]) if overlap and (p.dtype in HALF or asked.how == "tf32") else ""


def left_long_sums(asked: Asked) -> Plan | str:
    """Forward passes in 16 bits, channels_last and without a bias, in which the multiplication decides, are left to aten: of more pixels
    than the column kernels have, those of strides whose taps overlap, of LONG_SUMS channels, and those without strides, of many taps to WIDE_OUTPUTS channels."""
    p, g = asked.problem, asked.problem.geometry
    if (
        not _may_leave(asked)
        or p.direction != "forward"
        or g.groups > 1
        or p.dtype not in HALF
        or p.bias
        or not p.channels_last
        or p.destination == "width"
        or not p.dense
        or p.pixels <= columns.MOST_PIXELS
    ):
        return ""
    if max(g.stride) == 1:
        left = g.taps > shift.LONG and p.c_in >= shift.WIDE and p.c_out >= WIDE_OUTPUTS
    else:
        left = p.c_in >= LONG_SUMS and p.c_out >= shift.WIDE and all(a.kernel > a.stride for a in g.axes)
    return Plan("aten", LEFT["sums"]) if left else ""


def left_groups(asked: Asked) -> Plan | str:
    """Forward passes of groups that cuDNN is faster with are left to aten."""
    p = asked.problem
    if not _may_leave(asked) or p.direction != "forward" or p.geometry.groups == 1 or p.is_direct:
        return ""
    half = p.dtype in HALF
    wide = min(p.channels) >= shift.WIDE and (half or asked.how == "tf32")
    left = wide or (half and p.channels_last and p.geometry.ndim > 1)
    return Plan("aten", LEFT["groups"]) if left else ""


def left_gradient(asked: Asked) -> Plan | str:
    """Gradients are left to aten where it is faster."""
    p = asked.problem
    if not _may_leave(asked) or p.direction == "forward":
        return ""
    half, piece = p.dtype in HALF, 16 // p.dtype.itemsize
    vectors = p.c_in % piece == p.c_out % piece == 0
    arranged = p.source == p.destination == "width" and p.dense and vectors and not p.is_direct
    # cuDNN multiplies contiguous matrices as they lie (k1 of SECOND, CenterPoint and BEVFusion: copies took 2 to 3 times as long, in
    # both gradients; at TF32 it truncates the weight's, as torch's users have it).
    arranged = arranged and not _one_product(p)
    arranged = arranged and (half or min(p.channels) >= LEFT_CHANNELS)
    if p.direction == "backward_input":
        # With TF32 allowed cuDNN decides where to use it, as it does for torch; but its choice for torch is fp32 for long sums.
        if not (half or p.is_direct or (p.tf32 and p.products <= TF32_PRODUCTS)):
            return Plan("aten", LEFT["ieee_input"]) if not p.tf32 and _ieee_input(p) == "left" else ""
        # At TF32 a copy pays where the gradient of the weight shares it, and costs little by itself where there are strides; but with
        # few products for each element of the gradient cuDNN reads it as it lies (2.5 ps for 64, by what an H200 took).
        many = p.geometry.groups == 1 and p.products_of_output > LEFT_READ
        arranged = arranged and (half or (asked.how == "tf32" and max(p.geometry.stride) > 1 and many))
        return Plan("aten", LEFT[p.direction], arranged=arranged and prod(p.input_size) % piece == 0)
    if p.is_direct:
        return ""
    if not (half or p.tf32):
        return ""
    if half:
        return Plan("aten", LEFT[p.direction], arranged=arranged)
    # Copies are rounded on their way.  What cuDNN takes as it lies it may truncate, or compute in fp32 as it does with narrow groups.
    if arranged and asked.how == "tf32":
        return Plan("aten", LEFT[p.direction], "tf32", splits=_batch_parts(p), arranged=True)
    return Plan("aten", LEFT[p.direction])


def _ieee_input(p: Problem) -> str:
    """What becomes of backward_input in IEEE fp32, by what an H200 took: "left" to aten, of a "copied" gradient of the output, or
    "" for the portable kernel on it as it lies."""
    g, c_out = p.geometry, p.c_out
    if g.groups > 1 or g.ndim == 1:
        return ""
    volume = g.ndim == 3
    if not volume and power_of_two(c_out, 16, 32) >= MOSTLY_PADDING * c_out:
        return "left"
    if p.source != "width":
        return ""
    products = p.pixels * p.c_in * c_out * g.taps
    if all(a.kernel <= a.stride for a in g.axes):
        return "left" if not volume or 2 * products >= IEEE_INPUT_PRODUCTS else ""
    if products < IEEE_INPUT_PRODUCTS:
        return ""
    many = c_out >= IEEE_INPUT_CHANNELS or (volume and max(g.stride) == 1)
    return "copied" if many and c_out % 4 == 0 and p.dense else "" if volume else "left"


def _batch_parts(problem: Problem) -> int:
    """In how many parts of the batch aten sums a weight's gradient at TF32."""
    most = min(problem.batch, MOST_LEFT_PARTS)
    least = min(most, cdiv(problem.pixels, LEFT_PRODUCTS))
    return next((n for n in range(least, most + 1) if problem.batch % n == 0), least)


ONE_PRODUCT = "so few that all taps are one product"


def by_rows(asked: Asked) -> Plan | str:
    """The row kernel, for a forward pass of few output channels."""
    if asked.without("rows") or not rows.takes(asked.problem, asked.how, asked.target):
        return ""
    tile = rows.choose(asked.problem, asked.target)
    return Plan("rows", f"{asked.why}: {ONE_PRODUCT}", asked.how, tile) if tile else ""


def few_outputs(asked: Asked) -> Plan | str:
    """The column kernels, for a forward pass of few output channels."""
    p, geometry = asked.problem, asked.problem.geometry
    if p.direction != "forward" or geometry.groups > 1 or asked.without("columns"):
        return ""
    # In fp32 the CUDA cores are quicker where they are busy, and exact besides (FSRCNN's 56 to 1, k9: 360, 166 and 102 us for 395, 206 and
    # 128 at TF32; DCVC's 128 to 2, k3, in IEEE fp32: 188 for 407).
    if asked.how not in ("half", "widen") and isinstance(found := _few(asked), Plan):
        return found
    sizes = p.c_in, p.c_out, geometry.taps, p.pixels, p.dtype.itemsize
    tile = columns.of_few(*sizes, asked.how, p.large, p.weight, p.destination != "width", asked.target)
    return Plan("columns", f"{asked.why}: {ONE_PRODUCT}", asked.how, tile) if tile else ""


def few_channels(asked: Asked) -> Plan | str:
    """The few-channel kernels; of few outputs in IEEE fp32 also with sums in parts."""
    p = asked.problem
    cut = p.direction == "forward" and asked.how == "tf32x3" and p.geometry.groups == 1 and p.c_out <= few.FEW_FP32_OUT
    return _few(asked, cut=cut)


def few_beside_portable(asked: Asked) -> Plan | str:
    """The few-channel kernels, where the portable ones are what is left of a forward pass."""
    p = asked.problem
    found = _few(asked, portable=True) if p.direction == "forward" and not p.is_direct else ""
    return found if isinstance(found, Plan) else ""


def _few(asked: Asked, portable: bool = False, cut: bool = False) -> Plan | str:
    p, g = asked.problem, asked.problem.geometry.groups
    if asked.without("few"):
        return "" if portable else "the few-channel kernels are left out"
    c_src, c_dst = reversed(p.channels) if p.direction == "backward_input" else p.channels
    layer, rest = (p.direction, p.geometry, c_src, c_dst, p.large, asked.how), (p.destination, p.whole, portable)
    refused = few.refuse(*layer, p.source, *rest)
    copied = bool(refused) and _copied_for_few(asked) and not few.refuse(*layer, "width", *rest)
    if refused and not copied:
        return "" if refused == few.FULL else refused
    last, half = few.by_channels(g, c_src, p.whole), p.dtype in HALF
    sizes = p.batch, c_src, c_dst, p.input_size
    tile = few.choose(p.direction, p.geometry, *sizes, half, last, asked.target, portable, cut)
    if not tile:
        return "too few pixels for the few-channel kernels"
    why = f"{asked.why}{';' if portable else ':'} too few for the tensor core"
    if p.direction != "backward_weight":
        parts = few.parts(tile, p.geometry, *sizes, asked.target) if cut else 1
        return Plan("few", why, "", tile, parts, arranged=copied)
    pairs = p.c_in * p.c_out // g
    tiles = few.tiles(tile, p.geometry, p.batch, p.input_size, False)
    programs = p.geometry.axes3[0].kernel * pairs // tile.lanes
    return Plan(
        "few", why, "", tile, *configs.splits(tiles, programs, p.geometry.taps * pairs, tile.pixels, asked.target)
    )


def _copied_for_few(asked: Asked) -> bool:
    """Whether the few-channel kernels, which read along the width, may have a copy of channels_last: forward in IEEE fp32, where the
    tensor core takes three products (FSRCNN's 56 to 1, k9, took eight times as long as cuDNN on an H100)."""
    p = asked.problem
    if (
        p.direction != "forward"
        or p.geometry.groups > 1
        or asked.how != "tf32x3"
        or p.source not in ("channels", "vectors")
    ):
        return False
    whole = p.dense and prod(p.input_size) % (16 // p.dtype.itemsize) == 0 and p.pixels * p.c_in <= shift.MOST_COPIED
    return whole and p.c_in > few.FEW_IN and p.c_out <= few.FEW_FP32_OUT


def few_outputs_gradient(asked: Asked) -> Plan | str:
    """The patch kernel, for the weight's gradient of a layer of few output channels."""
    p = asked.problem
    if asked.without("patches") or not patches.takes(p, asked.how, asked.target):
        return ""
    # At TF32 in three products: torch's own choice is IEEE fp32 for such layers, unless it has to be deterministic.
    how = "tf32x3" if asked.how == "tf32" else asked.how
    why = f"{asked.why}: {ONE_PRODUCT}"
    return Plan("patches", why, how, *patches.choose(p, asked.target))


def writing_weight(asked: Asked) -> Plan | str:
    """The column kernels, for a weight's gradient that is mostly writing."""
    p = asked.problem
    if p.direction != "backward_weight" or p.is_direct or asked.without("columns"):
        return ""
    c_in, c_out = p.channels
    activations = p.pixels * p.c_in + _outputs(p)
    width = c_out * p.geometry.taps
    tile = columns.of_weight(p.geometry.groups, c_in, width, p.pixels, activations, p.dtype.itemsize, p.large)
    return Plan("columns", f"{asked.why}: writing the weight takes the time", "", tile) if tile else ""


def reading_weight(asked: Asked) -> Plan | str:
    """The column kernels, for a forward pass that is mostly reading the weight."""
    p, g = asked.problem, asked.problem.geometry.groups
    if p.direction != "forward" or p.is_direct:
        return ""
    if asked.without("columns"):
        return "the column kernels are left out"
    c_in, c_out = p.channels
    sizes = g, c_in, c_out * p.geometry.taps, p.pixels, p.dtype.itemsize
    if refused := columns.refuse(*sizes, p.large, p.weight):
        return refused
    tile, splits, time = columns.choose(*sizes, asked.target)
    other, parts = _gather_gemm(asked)
    steps = cdiv(p.most_taps * cdiv(c_in, other.block_k), parts)
    streamed = steps * (other.block_m + other.block_n) * other.block_k * p.dtype.itemsize
    weight = p.c_in * c_out * p.geometry.taps * p.dtype.itemsize
    if time > columns.LESS * columns.packed(weight, streamed, parts):
        return "the columns would be more to move than a packed weight"
    choice = _shift_choice(asked)
    quicker = isinstance(choice, shift.Choice) and choice.time(weight) < columns.measured(
        time, p.pixels, p.dtype.itemsize
    )
    left = not isinstance(blocked(asked), Plan) and (
        left_product(asked) or left_images(asked)
    )  # before the shift kernel
    if quicker and not left:
        return "the shift kernel is quicker than reading the weight"
    return Plan("columns", f"{asked.why}: reading the weight takes the time", asked.how, tile, splits)


HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def blocked(asked: Asked) -> Plan | str:
    """The block kernel, for kernel = stride without padding."""
    p, target = asked.problem, asked.target
    if p.direction != "forward" or not blocks.takes(p.geometry):
        return ""
    if shift.unavailable(target):
        return ""  # the shift kernel says it, too
    if asked.without("blocks"):
        return "the block kernel is left out"
    layout = "channels" if p.channels_last else "width"
    same = p.source == p.destination == "width" or (p.channels_last and p.destination in ("channels", "vectors"))
    # Of one tap channels lie side by side either way.
    lies = p.weight == "pieces" if p.channels_last or p.geometry.taps == 1 else p.weight == "taps"
    lies = asked.how == "tf32" or (asked.how == "half" and lies)
    if asked.how not in ("half", "tf32"):
        return "the block kernel has 16 bits and TF32"
    rows = prod(p.geometry.output_size(p.input_size)[:-1]) * (p.batch if p.channels_last else 1)
    if (
        not (lies and same and p.dense and p.aligned)
        or p.c_in < shift.LEAST_CHANNELS
        or max(p.pixels, rows) >= blocks.MOST_PIXELS
    ):
        return "not what the block kernel's bulk copies take"
    sizes = p.batch, p.c_in, p.c_out, p.input_size
    stride = sizes3(p.geometry.kernel)
    tile = blocks.choose(stride, *sizes, HALVES.get(p.dtype, asked.how), layout, target.processors)
    return Plan("blocks", asked.why, asked.how, tile) if tile else "none of the block kernel's tiles fits"


def shifted(asked: Asked) -> Plan | str:
    """The shift kernel."""
    choice = _shift_choice(asked)
    if isinstance(choice, str):
        return choice
    return Plan("shift", asked.why, asked.how, choice.tile, choice.splits, arranged=choice.arranged)


def _shift_choice(asked: Asked) -> shift.Choice | str:
    """The shift kernel's choice, or why it takes no part."""
    p, target, g = asked.problem, asked.target, asked.problem.geometry.groups
    if p.direction != "forward" or p.is_direct:
        return ""
    if asked.without("shift"):
        return "the shift kernel is left out"
    if refused := shift.refuse(p.geometry, *p.channels, p.large, asked.how, p.source, p.destination, target):
        return refused
    dense = p.dense and (g == 1 or p.batch == 1)  # as a group's part of the tensors is
    choice = shift.choose(
        p.geometry, p.batch, *p.channels, p.input_size, HALVES.get(p.dtype, asked.how), p.source, p.destination, p.vector,
        dense, target.triton >= shift.ROUNDING_TRITON, target.processors,
    )  # fmt: skip
    if choice is None or choice.share < (shift.LEAST_SHARE if g == 1 else shift.LEAST_SHARE_OF_GROUP):
        return "none of the shift kernel's tiles fits or fills the GPU"
    if choice.splits > 1 and g > 1 and p.batch > 1:
        return "the sums of groups of several images are not cut into parts"  # a group's part of the output is not dense then
    tile = choice.tile
    return choice._replace(tile=replace(tile, raw=shift.takes_raw(tile, p.weight, p.channels[1])))


def long_strides(asked: Asked) -> Plan | str:
    """The long-stride kernels."""
    p = asked.problem
    width = (p.source if p.direction == "backward_input" else p.destination) == "width"
    if asked.without("long") or p.large:
        return ""
    if not long.takes(p.direction, p.geometry, p.channels, p.pixels, p.is_direct, p.dtype in HALF, width):
        return ""
    tile, splits = long.choose(p.direction, p.geometry, p.batch, *p.channels, p.input_size, asked.target)
    neighbours = "phases" if p.direction == "forward" else "taps"
    return Plan("long", f"{asked.why}; with such strides {neighbours} lie side by side", "", tile, splits)


def on_grid(asked: Asked) -> Plan | str:
    """A weight's gradient of copies on a grid of pixels."""
    p, target = asked.problem, asked.target
    if asked.without("grid") or not grid.takes(p, asked.how, target):
        return ""
    return Plan(
        "grid",
        f"{asked.why}: products of copies whose pixels lie side by side",
        asked.how,
        *grid.choose(p, asked.how, target),
    )


def direct(asked: Asked) -> Plan | str:
    """The direct kernels, for what would leave a tensor core's tile mostly padding."""
    p, geometry, target = asked.problem, asked.problem.geometry, asked.target
    if not p.is_direct:
        return ""
    c_in, c_out = p.channels
    why = f"{asked.why}; they would fill {max(c_in, c_out)}/16 of a tensor-core tile"
    if p.direction != "backward_weight":
        rows, width, _, _ = _gathered(p)
        channels = p.c_out if p.direction == "forward" else p.c_in
        return Plan("direct", why, "", configs.direct(rows, width, channels, p.channels_last, target))
    rows, width = p.batch * prod(p.input_size[:-1]), p.input_size[-1]
    config = configs.direct(rows, width, p.c_in * c_out, p.channels_last, target)
    programs = geometry.taps * cdiv(p.c_in * c_out, config.block_n)
    return Plan("direct", why, "", config, *_pixel_splits(p, config.block_m, config.box_w, programs, target))


def portable(asked: Asked) -> Plan | str:
    """The kernels that take everything, on every GPU."""
    p, target = asked.problem, asked.target
    if p.direction != "backward_weight":
        copied = _copied_for_gemm(asked)
        if copied:
            p = replace(p, source="channels" if p.c_out % 16 else "vectors")
        config, splits = _gather_gemm(replace(asked, problem=p))
        return Plan("gemm", asked.why, asked.how, config, splits, arranged=copied)
    c_in, c_out = p.channels
    rows, width = p.batch * prod(p.input_size[:-1]), p.input_size[-1]
    copied = _copied_for_weight(asked)
    vectors = p.source == "vectors"
    config = configs.weight_gemm(rows, width, c_in, c_out, p.dtype.itemsize, asked.how, vectors, target)
    programs = p.geometry.taps * p.geometry.groups * cdiv(c_in, config.block_m) * cdiv(c_out, config.block_n)
    splits, each = _pixel_splits(p, config.block_k, config.box_w, programs, target)
    return Plan("gemm", asked.why, asked.how, config, splits, each, copied)


def _copied_for_gemm(asked: Asked) -> bool:
    """Whether the portable kernel has a copy of the output's gradient with its channels innermost: its pixels a stride apart
    touch as many sectors of a contiguous one as there are channels."""
    p = asked.problem
    if p.direction != "backward_input" or asked.how not in ("ieee", "tf32x3") or asked.target.backend == "hip":
        return False
    return _outputs(p) <= shift.MOST_COPIED and _ieee_input(p) == "copied"


def _copied_for_weight(asked: Asked) -> bool:
    """Whether the portable kernel has copies of both activations with their channels innermost, for a weight's gradient in IEEE fp32."""
    p = asked.problem
    if asked.how != "tf32x3" or p.geometry.groups > 1 or not p.source == p.destination == "width" or not p.dense:
        return False
    if p.c_in % 4 or p.c_out % 4 or min(p.channels) < IEEE_WEIGHT_CHANNELS:
        return False
    if p.products_of_output < IEEE_WEIGHT_READ:
        return False
    return max(_outputs(p), p.pixels * p.c_in) <= shift.MOST_COPIED


def _outputs(p: Problem) -> int:
    """Elements of the output."""
    return p.batch * p.c_out * prod(p.geometry.output_size(p.input_size))


def _pixel_splits(p: Problem, pixels: int, box: int, programs: int, target: Target) -> tuple[int, int]:
    """(splits, tiles a split) of backward_weight's sums over tiles of so many pixels in rows of box."""
    rows, width = p.batch * prod(p.input_size[:-1]), p.input_size[-1]
    tiles = cdiv(rows, pixels // box) * cdiv(width, box)
    return configs.splits(tiles, programs, p.geometry.taps * p.c_in * p.channels[1], pixels, target)


def _gathered(p: Problem) -> tuple[int, int, int, int]:
    """(rows, their width, phases, outputs a channel) of what the forward pass or backward_input writes, a phase at a time."""
    size, stride = p.input_size, p.geometry.stride
    if p.direction != "forward":
        return p.batch * prod(size[:-1]), size[-1], 1, prod(size)
    output = p.geometry.output_size(size)
    *rows, width = (cdiv(o, s) for o, s in zip(output, stride))
    return p.batch * prod(rows), width, prod(min(o, s) for o, s in zip(output, stride)), prod(output)


def _gather_gemm(asked: Asked) -> tuple[configs.Config, int]:
    """(tile, splits) of the portable forward pass or backward_input."""
    p, g = asked.problem, asked.problem.geometry.groups
    rows, width, phases, outputs = _gathered(p)
    forward = p.direction == "forward"
    taps, (c_src, c_dst) = (p.most_taps, p.channels) if forward else (p.geometry.taps, p.channels[::-1])
    config = configs.gather_gemm(
        rows, width, phases * g, c_src, c_dst, p.dtype.itemsize, asked.how, p.source == "vectors", p.large, asked.target
    )  # fmt: skip
    tiles = cdiv(rows, config.block_m // config.box_w) * cdiv(width, config.box_w)
    programs, steps = tiles * phases * g * cdiv(c_dst, config.block_n), taps * cdiv(c_src, config.block_k)
    return config, configs.gather_splits(programs, steps, p.batch * c_dst * g * outputs, asked.target)


FAMILIES: tuple[Callable[[Asked], Plan | str], ...] = (
    by_rows,
    few_outputs,
    few_channels,
    few_outputs_gradient,
    writing_weight,
    reading_weight,
    left_long_sums,
    blocked,
    left_product,
    left_images,
    shifted,
    long_strides,
    left_groups,
    left_gradient,
    on_grid,
    few_beside_portable,
    direct,
    portable,
)
