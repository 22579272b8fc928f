"""Every kernel compiles for every GPU served, under the installed Triton and others, and fits there.

The launches are recorded from the library itself at the sizes of real layers (meta tensors, so that neither a
GPU nor memory is needed) and compiled by tests/aot.py.  TCONV_TRITON_DIRS lists directories that hold other
Triton releases (pip install --no-deps --target DIR triton==X), separated as in PATH.
"""

import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

import tconv.kernels
from tconv import blocks, probe, shift
from tconv import launch as launcher
from tconv.configs import Target
from tconv.geometry import Geometry

KERNELS = {
    "gemm": ("gather_gemm", "weight_gemm"),
    "pack": ("pack_weight",),
    "few": ("gather_few", "weight_few"),
    "columns": ("column_gemm", "add_columns", "weight_columns"),
    "direct": ("gather_direct", "weight_direct"),
    "long": ("gather_phases", "input_columns"),
    "patches": ("patch_weight",),
    "grid": ("lay_on_grid", "weight_grid"),
    "rows": ("column_rows",),
    "reduce": ("sum_partials", "sum_splits", "sum_pixels"),
    "blocks": ("blocks_forward",),
    "shift": ("shift",),
    "probe": ("probe",),
    "copies": ("arrange",),
}
# Kernels that a target does not run: gradients are left to cuDNN alone, and AMD's compiler has no product in three parts.
HOPPER = {"blocks_forward", "shift", "probe", "lay_on_grid", "weight_grid", "column_rows"}
ELSEWHERE = {"sm_90": set(), "gfx942": {*HOPPER, "arrange", "patch_weight"}}
# name: (Target, aot.py's arguments, shared memory a block in bytes).  Tiles for sm_80 also serve sm_86 and sm_89.
TARGETS = {
    "sm_80": (Target("cuda", 80, 108), ("cuda", "80"), 99 * 1024),
    "sm_86": (Target("cuda", 86, 84), ("cuda", "86"), 99 * 1024),
    "sm_89": (Target("cuda", 89, 128), ("cuda", "89"), 99 * 1024),
    "sm_90": (Target("cuda", 90, 132), ("cuda", "90"), 227 * 1024),
    "sm_100": (Target("cuda", 100, 148), ("cuda", "100"), 227 * 1024),
    "gfx942": (Target("hip", 942, 304), ("hip", "gfx942"), 64 * 1024),
}
AS_SM_80 = "sm_86", "sm_89"  # to Triton; to ptxas they differ
# Bytes a thread: a handful of values that ptxas parks in memory outside the loop is no matter; hundreds are.
SPILL_LIMIT = 64
# The matrix instructions of which a GEMM kernel must use one.
MATRIX_INSTRUCTIONS = {
    **{name: {"mma.sync"} for name in ("sm_80", *AS_SM_80)},
    "sm_90": {"wgmma"},
    "sm_100": {"tcgen05", "mma.sync"},
    "gfx942": {"mfma"},
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAST, FIRST = True, False


def layer(c_in, c_out, kernel, size, batch, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    n = len(size)
    values = ((v,) * n for v in (kernel, stride, padding, output_padding))
    return batch, c_in, c_out, size, Geometry(*values, groups, (dilation,) * n)


# name: (layer, dtype, channels_last, tf32)
LAYERS = {
    "dcgan-bf16-nhwc": (layer(512, 256, 4, (8, 8), 64, stride=2, padding=1), BF16, LAST, True),
    "dcgan-fp16-nchw": (layer(512, 256, 4, (8, 8), 64, stride=2, padding=1), FP16, FIRST, True),
    "unet-tf32-nchw": (layer(256, 128, 2, (56, 56), 16, stride=2), FP32, FIRST, True),
    "square-fp32-nchw": (layer(64, 128, 3, (128, 128), 8, padding=1), FP32, FIRST, False),
    "square-fp32-nhwc": (layer(64, 128, 3, (128, 128), 8, padding=1), FP32, LAST, False),
    "unet-fp32-nchw": (layer(128, 64, 4, (64, 64), 16, stride=2, padding=1), FP32, FIRST, False),
    "few-fp32-nchw": (layer(48, 48, 3, (75, 59), 20, padding=1), FP32, FIRST, False),
    "together-tf32-nchw": (layer(64, 64, 3, (256, 256), 8, padding=1), FP32, FIRST, True),
    "by-row-bf16-nhwc": (layer(64, 64, 7, (128, 128), 8, padding=3), BF16, LAST, True),
    "tiles-bf16-nhwc": (layer(64, 48, 2, (128, 128), 8, stride=2), BF16, LAST, True),
    "image-bf16-nhwc": (layer(64, 3, 4, (64, 64), 128, stride=2, padding=1), BF16, LAST, True),
    "image-bf16-nchw": (layer(64, 3, 4, (64, 64), 128, stride=2, padding=1), BF16, FIRST, True),
    "images-fp32-nchw": (layer(64, 3, 4, (128, 128), 128, stride=2, padding=1), FP32, FIRST, False),
    "images-bf16-nchw": (layer(64, 3, 4, (128, 128), 128, stride=2, padding=1), BF16, FIRST, True),
    "flow-fp32-nhwc": (layer(2, 2, 4, (48, 64), 8, stride=2, padding=1), FP32, LAST, True),
    "flow-tf32-nchw": (layer(629, 2, 4, (24, 28), 8, stride=2, padding=1), FP32, FIRST, True),
    "mask-fp32-nhwc": (layer(64, 1, 2, (160, 160), 4, stride=2), FP32, LAST, False),
    "odd-bf16-nhwc": (layer(66, 20, 3, (64, 64), 32, padding=1), BF16, LAST, True),
    "odd-tf32-nhwc": (layer(65, 17, 2, (64, 64), 32, stride=2), FP32, LAST, True),
    "speech-fp32": (layer(48, 8, 8, (64084,), 4, stride=4), FP32, FIRST, False),
    "weight-bf16-nhwc": (layer(1024, 512, 4, (8, 8), 1, stride=2, padding=1), BF16, LAST, True),
    "weight-fp16-nchw": (layer(1024, 512, 4, (8, 8), 1, stride=2, padding=1), FP16, FIRST, True),
    "weight-fp32-nchw": (layer(1024, 512, 4, (8, 8), 1, stride=2, padding=1), FP32, FIRST, False),
    "weight-tf32-nchw": (layer(1024, 512, 4, (8, 8), 1, stride=2, padding=1), FP32, FIRST, True),
    "spot-bf16-nhwc": (layer(1024, 512, 4, (2, 2), 1, stride=2, padding=1), BF16, LAST, True),
    "spot-fp16": (layer(1536, 768, 16, (4,), 1, stride=8), FP16, FIRST, True),
    "innermost-fp32-nchw": (layer(512, 512, 4, (2, 2), 16, stride=2, padding=1), FP32, FIRST, True),
    "volume-bf16-ndhwc": (layer(64, 32, 3, (16, 32, 32), 8, stride=2, padding=1, output_padding=1), BF16, LAST, True),
    "volume-groups-fp32": (layer(32, 32, 3, (16, 32, 32), 8, stride=2, groups=4), FP32, FIRST, True),
    "vocoder-fp16": (layer(512, 256, 16, (32,), 16, stride=8, padding=4), FP16, FIRST, True),
    "codec-fp16": (layer(384, 192, 6, (9800,), 1, stride=3, padding=2, output_padding=1), FP16, FIRST, True),
    "uneven-tf32-nhwc": (layer(64, 64, 6, (75, 60), 16, stride=3, padding=2), FP32, LAST, True),
    "depthwise-bf16-nhwc": (layer(256, 256, 3, (56, 56), 32, stride=2, padding=1, groups=256), BF16, LAST, True),
    "depthwise-fp32-nchw": (layer(256, 256, 3, (56, 56), 32, stride=2, padding=1, groups=256), FP32, FIRST, True),
    "depthwise-bf16-ncdhw": (layer(64, 64, 5, (32, 32, 32), 2, stride=2, padding=2, groups=64), BF16, FIRST, True),
    "depthwise-fp32-ndhwc": (layer(64, 64, 5, (32, 32, 32), 2, stride=2, padding=2, groups=64), FP32, LAST, True),
    "antialias-fp16": (layer(192, 192, 12, (8202,), 4, stride=2, groups=192), FP16, FIRST, True),
    "upsample-bf16-nchw": (layer(64, 64, 8, (32, 32), 16, stride=4, padding=2, groups=64), BF16, FIRST, True),
    "bilinear-bf16-nchw": (layer(21, 21, 64, (16, 16), 1, stride=32, padding=16, groups=21), BF16, FIRST, True),
    "bilinear-fp32-nhwc": (layer(21, 21, 64, (16, 16), 1, stride=32, padding=16, groups=21), FP32, LAST, True),
    "upscore-fp32-nchw": (layer(21, 21, 64, (12, 16), 1, stride=32), FP32, FIRST, False),
    "upscore-bf16-nhwc": (layer(20, 20, 12, (40, 48), 1, stride=8), BF16, LAST, True),
    "narrow-tf32-ndhwc": (layer(32, 16, 2, (48, 48, 48), 4, stride=2), FP32, LAST, True),
    "narrow-bf16-nchw": (layer(48, 16, 2, (256, 256), 8, stride=2), BF16, FIRST, True),
    "narrow-fp16-nhwc": (layer(48, 14, 1, (250, 256), 8), FP16, LAST, True),
    "few-tf32-nchw": (layer(192, 3, 5, (256, 384), 1, stride=2, padding=2, output_padding=1), FP32, FIRST, True),
    "five-fp32-nchw": (layer(150, 5, 4, (136, 240), 1, stride=2, padding=1), FP32, FIRST, False),
    "taps-fp32-nchw": (layer(128, 32, 3, (48, 48), 8, padding=1), FP32, FIRST, False),
    "wide-fp32-nchw": (layer(256, 192, 4, (16, 12), 32, stride=2, padding=1), FP32, FIRST, False),
    "large-bf16-nhwc": (layer(64, 64, 2, (2048, 2048), 16, stride=2), BF16, LAST, True),
    "large-fp32-nchw": (layer(64, 64, 2, (2048, 2048), 16, stride=2), FP32, FIRST, True),
    "large-depthwise-bf16-nhwc": (layer(64, 64, 2, (2048, 2048), 16, stride=2, groups=64), BF16, LAST, True),
}

# What only Hopper has forms of its own for: the forward pass.
HOPPER_LAYERS = {
    "blocks-bf16-nchw": (layer(256, 128, 2, (128, 128), 8, stride=2), BF16, FIRST, True),
    "blocks-fp16-ncdhw": (layer(64, 32, 2, (24, 24, 24), 8, stride=2), FP16, FIRST, True),
    "blocks-tf32-nchw": (layer(128, 64, 2, (128, 128), 8, stride=2), FP32, FIRST, True),
    "blocks-tf32-ndhwc": (layer(64, 32, 2, (32, 64, 64), 8, stride=2), FP32, LAST, True),
    "lies-blocks-bf16-nhwc": (layer(256, 128, 2, (128, 128), 8, stride=2), BF16, LAST, True),
    "lies-bf16-nhwc": (layer(512, 256, 4, (16, 16), 32, stride=2, padding=1), BF16, LAST, True),
    "lies-fp16-nhwc": (layer(64, 136, 3, (64, 64), 16, padding=1), FP16, LAST, True),
    "lies-resident-bf16-nhwc": (layer(64, 64, 2, (128, 128), 16, stride=2), BF16, LAST, True),
    "lies-bf16-ndhwc": (layer(64, 64, 3, (16, 32, 32), 8, stride=2, padding=1, output_padding=1), BF16, LAST, True),
    "copied-fp16-nchw": (layer(1024, 512, 2, (32, 32), 8, stride=2), FP16, FIRST, True),
    "copied-tf32-nhwc": (layer(1024, 1024, 2, (48, 48), 1, stride=2), FP32, LAST, True),
    "shared-bf16-nchw": (layer(128, 256, 1, (188, 188), 4), BF16, FIRST, True),
    "runs-bf16": (layer(256, 128, 11, (4000,), 1, stride=5, padding=3), BF16, FIRST, True),
    "long-tf32": (layer(80, 80, 1024, (63,), 12, stride=256), FP32, FIRST, True),
    "strips-bf16-nchw": (layer(768, 384, 3, (6, 6), 128, stride=2, padding=1, output_padding=1), BF16, FIRST, True),
    "strips-tf32-ncdhw": (layer(64, 64, 3, (12, 16, 32), 3, stride=2, padding=1, output_padding=1), FP32, FIRST, True),
    "strips-tf32-ndhwc": (layer(384, 192, 2, (6, 6, 6), 8, stride=2), FP32, LAST, True),
    "together-bf16-nchw": (layer(64, 64, 3, (256, 256), 8, padding=1), BF16, FIRST, True),
    "together-tf32-ncdhw": (layer(16, 64, 3, (8, 128, 128), 4, padding=1), FP32, FIRST, True),
    "parts-fp16-nhwc": (layer(1024, 256, 4, (16, 16), 1, stride=2, padding=1), FP16, LAST, True),
}


def triton_type(value) -> str:
    """An argument's type in a kernel's signature, with what a launch would specialise it on."""
    if isinstance(value, torch.Tensor):
        names = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.float64: "*fp64"}
        small = value.untyped_storage().nbytes() < 2**31  # AMD's compiler asks
        return names[value.dtype] + (" DS" if small else " D")
    if hasattr(value, "block_shape"):
        name = triton_type(value.base).split()[0].lstrip("*")
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # which Gluon's have
        return f"tensordesc<{name}{value.block_shape}{layout}>".replace(" ", "")
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def kernels(module: str) -> dict:
    """The kernels of a module of tconv.kernels, by name."""
    name = f"tconv.kernels.{module}"
    found = vars(importlib.import_module(name)).items()
    return {k: v for k, v in found if hasattr(v, "fn") and v.fn.__module__ == name and not k.startswith("_")}


class Recorder:
    """Stands in for a kernel and writes its launches down."""

    def __init__(self, module, kernel, launches):
        self.module, self.kernel, self.launches = module, kernel, launches
        self.names = list(inspect.signature(kernels(module)[kernel].fn).parameters)

    def __getitem__(self, grid):
        assert all(0 < n < 2**31 for n in grid)
        return self.launch

    def launch(self, *args, **constants):
        options = {
            k: constants.pop(k)
            for k in ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion", "maxnreg")
            if k in constants
        }
        assert options["enable_fp_fusion"]  # or Triton 3.9 warns the user, and 3.10 splits multiply-adds
        if "ACC" in constants:
            constants["ACC"] = constants["ACC"].name.replace("fp", "float")
        arguments = dict(zip(self.names, args, strict=False))
        for name in ("p", "t"):  # a tile, as a dataclass prints itself
            if name in arguments or name in constants:
                constants[name] = repr(arguments.pop(name, None) or constants[name])
        assert set(self.names) == set(arguments) | set(constants)
        self.launches.append(
            dict(
                module=self.module,
                kernel=self.kernel,
                types={name: triton_type(value) for name, value in arguments.items()},
                constants=constants,
                options=options,
            )
        )


def record(target: Target) -> list[dict]:
    """The distinct launches of all passes of all layers on a target."""
    launches: dict[str, dict] = {}
    with pytest.MonkeyPatch.context() as patch:
        found: list[dict] = []
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(f"tconv.kernels.{module}.{name}", Recorder(module, name, found))
        if target.arch == 90:
            for tile in probe.TILES.values():
                probe.launch(tile, *probe.sample(tile, "meta"))
                name = f"probe {tile.dtype}"
                launches[name] = found.pop() | {"name": name}
        layers = LAYERS | (HOPPER_LAYERS if target.arch == 90 else {})
        for title, ((batch, c_in, c_out, size, geometry), dtype, last, tf32) in layers.items():
            patch.setattr(launcher, "allow_tf32", lambda tf32=tf32: tf32)
            format = (
                (torch.channels_last if len(size) == 2 else torch.channels_last_3d) if last else torch.contiguous_format
            )
            like = dict(dtype=dtype, device="meta")
            x = torch.empty((batch, c_in, *size), **like, memory_format=format)
            y = torch.empty((batch, c_out, *geometry.output_size(size)), **like, memory_format=format)
            weight = torch.empty((c_in, c_out // geometry.groups, *geometry.kernel), **like)
            if title.startswith("lies"):
                weight = weight.contiguous(memory_format=format)
            passes = (
                (launcher.forward, (x, weight, torch.empty(c_out, **like), geometry)),
                (launcher.backward_input, (y, weight, size, geometry)),
                (launcher.backward_weight, (y, x, geometry)),
                (launcher.backward_bias, (y,)),
            )
            for function, arguments in passes[:1] if title in HOPPER_LAYERS else passes:
                for without in (("aten",), ()):  # what runs beside aten is launched, too
                    chosen = replace(target, without=without)
                    patch.setattr(launcher, "target_of", lambda device, chosen=chosen: chosen)
                    launcher.record.forget()  # what is left to aten would be found again
                    function(*arguments)
                    assert not title.startswith("lies") or "pack_weight" not in [each["kernel"] for each in found]
                for each in found:
                    # Numbered: a pass may launch a kernel twice.
                    name = f"{title} {function.__name__} {each['kernel']} {len(launches)}"
                    kind = json.dumps(each)
                    if target.backend == "cuda":  # for which a small tensor is like any other
                        kind = kind.replace(' DS"', ' D"')
                    launches.setdefault(kind, each | {"name": name})
                found.clear()
    return list(launches.values())


def overlapping(launch) -> list[str]:
    """What a kernel says to the launch behind it, and that it waits for those ahead."""
    constants = launch["constants"]
    if launch["kernel"] == "shift":
        return ["wait"]
    if launch["kernel"] == "blocks_forward":
        return ["wait"] if eval(constants["p"], vars(blocks)).size == 4 else []  # for the packed weight
    if constants.get("OVERLAPS"):
        return ["launch_dependents", "wait"]
    return ["launch_dependents"] if constants.get("EARLY") else []


def judge(launch, result, target: str):
    """What is wrong with a compiled launch, in words."""
    if "error" in result:
        yield result["error"]
        return
    shared_limit = TARGETS[target][2]
    constants = launch["constants"]
    if result["shared"] > shared_limit:
        yield f"{result['shared']} bytes of shared memory, {shared_limit} is the limit"
    if result["spills"] > SPILL_LIMIT:
        yield f"{result['spills']} bytes (or, on AMD, registers) spilled"
    if launch["kernel"] == "shift":
        if not result["bulk"]:
            yield "no bulk copy"
        tile = eval(constants["p"], vars(shift))
        if result["stored"] != [tile.dst_vector * tile.dst_size]:
            yield f"stores of {result['stored']} bytes, expected {tile.dst_vector} x {tile.dst_size}"
    if launch["kernel"] == "blocks_forward":
        if not result["bulk"] or result["stored"] or result["spills"]:
            yield "bulk copies and stores alone, nothing spilled"
        # Accumulators go to shared memory by the pair, or in channels_last of 16 bits by the matrix.
        if min(result["to_shared"]) < 4:
            yield f"stores of {result['to_shared']} bytes to shared memory"
    if launch["kernel"] == "weight_grid":
        if not result["bulk"] or result["spills"]:
            yield "operands by bulk copies, nothing spilled"
        if constants["PARTS"] == 2 and result["added"] != constants["TAPS"]:
            yield f"{result['added']} sums in fp32, expected one for each of {constants['TAPS']} taps"
    if result["overlaps"] != overlapping(launch):
        yield f"of launches that overlap it has {result['overlaps']}, expected {overlapping(launch)}"
    if constants.get("PRECISION", "ieee") != "ieee" or launch["kernel"] in HOPPER - {"lay_on_grid"}:
        # wgmma has no tile of fewer than 64 rows.
        wanted = (
            {"mma.sync"} if target == "sm_90" and constants.get("BLOCK_M", 64) < 64 else MATRIX_INSTRUCTIONS[target]
        )
        if not wanted & set(result["matrix"]):
            yield f"no {' or '.join(sorted(wanted))} instruction"
    layouts = {"gather_gemm": ("SRC_LAYOUT",), "column_gemm": ("SRC_LAYOUT",), "weight_gemm": ("X_LAYOUT", "Y_LAYOUT")}
    sources = layouts.get(launch["kernel"], ())
    half = launch["types"].get("x", "*fp16")[1:5] in ("bf16", "fp16")  # fp32's weight gradient transposes its tiles
    if target != "gfx942" and sources and half and all(constants[key] == "vectors" for key in sources):
        # Asynchronous copies of 16 bytes a thread; on sm_90 of every byte of both operands' tiles, in each stage.
        size = 4 if "fp32" in launch["types"].get("src", "") else 2
        tiles = (constants["BLOCK_M"] + constants["BLOCK_N"]) * constants["BLOCK_K"] * size
        expected = launch["options"]["num_stages"] * tiles
        if set(result["copied"]) != {"16"} or (target == "sm_90" and result["copied"]["16"] != expected):
            yield f"copies {result['copied']} bytes by vector width, expected {expected} in vectors of 16"


def releases():
    """The Triton releases to compile under: None for the installed one, and the other ones' directories."""
    directories = os.environ.get("TCONV_TRITON_DIRS")
    if not directories:
        unset = pytest.mark.skip(reason="TCONV_TRITON_DIRS names no other Triton release")
        return [pytest.param(None, id="installed"), pytest.param("", id="others", marks=unset)]
    others = [d for d in directories.split(os.pathsep) if release(d) != triton.__version__]
    return [pytest.param(None, id="installed"), *(pytest.param(d, id=Path(d).name) for d in others)]


def release(directory):
    """The version of the Triton in a directory; None where there is none to be found."""
    return next((d.version for d in importlib.metadata.distributions(name="triton", path=[directory])), None)


def share(launches, directory, target):
    """Those of the launches to compile under a release for a target: all of them took an hour on two cores.

    The installed release compiles all for each target, but for those that are sm_80 to Triton one half each.  To the other
    releases each kernel's launches are dealt out: of Hopper's kernels each launch to one of them, of every other kernel to
    one of them for one target, and at least one to each."""
    if directory is None:
        return launches[AS_SM_80.index(target) :: len(AS_SM_80)] if target in AS_SM_80 else launches
    others = [parameter.values[0] for parameter in releases()[1:]]
    pairs = [(each, name) for each in others for name in TARGETS if name not in AS_SM_80]
    many = Counter(each["kernel"] for each in launches)
    number: Counter[str] = Counter()
    shared = []
    for each in launches:
        kernel = each["kernel"]
        hands, turn = (others, directory) if kernel in HOPPER else (pairs, (directory, target))
        dealt = min(len(hands), many[kernel])
        if number[kernel] % dealt == hands.index(turn) % dealt:
            shared.append(each)
        number[kernel] += 1
    return shared


def test_every_kernel_is_listed():
    modules = {m.name for m in pkgutil.iter_modules(tconv.kernels.__path__)} - {"common", "hopper"}
    assert {module: set(kernels(module)) for module in modules} == {m: set(names) for m, names in KERNELS.items()}


@pytest.mark.timeout(1500)  # hundreds of kernels: five minutes for sm_90 on two cores, ten beside other work
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("directory", releases())
def test_compiles_and_fits(directory, target, tmp_path):
    if directory and target in AS_SM_80:
        pytest.skip("sm_80 to Triton: under one release")
    description, arguments, _ = TARGETS[target]
    if directory is not None:
        assert (Path(directory) / "triton" / "__init__.py").is_file(), f"TCONV_TRITON_DIRS: no triton in {directory}"
    version = triton.__version__ if directory is None else release(directory)
    launches = record(replace(description, triton=tuple(map(int, version.split(".")[:2]))))
    listed = {name for names in KERNELS.values() for name in names}
    assert {each["kernel"] for each in launches} == listed - ELSEWHERE.get(target, HOPPER)
    launches = share(launches, directory, target)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    if directory is not None:
        environment["PYTHONPATH"] = directory
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py"), *arguments],
        input=json.dumps(launches),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = {r["launch"]: r for r in map(json.loads, process.stdout.splitlines())}
    assert set(results) == {each["name"] for each in launches}
    assert directory is None or all(Path(r["from"]).is_relative_to(Path(directory).resolve()) for r in results.values())
    faults = [f"{each['name']}: {fault}" for each in launches for fault in judge(each, results[each["name"]], target)]
    assert not faults, "\n".join(faults)
