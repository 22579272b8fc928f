"""Compare what a recorded call launches with what its first call launched, with no GPU, under whichever Triton is here.

    python tests/recorded.py

A driver that launches nothing stands in for the GPU: it writes down what Triton's own launch path and a Record's hand
to it.  One line a pass goes out; the exit status is 1 where they differ.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tconv import dispatch, launch, layouts, record
from tconv.bench.compiler import Driver
from tconv.configs import Target
from tconv.geometry import Geometry

started: list[tuple] = []


class Launcher:
    """Of a compiled kernel: writes down what it is called with, and calls the hook."""

    def __init__(self, source, metadata):
        self.overlaps = metadata.launch_pdl

    def __call__(self, *args):
        if args[7]:
            args[7](args[6])
        started.append((*args[:6], self.overlaps, *args[9:]))  # without the launch's metadata and hooks


def written(tensors) -> list[list]:
    """The launches since the last call of this, tensors named by when they first appeared."""
    names = {t.data_ptr(): f"argument {i}" for i, t in enumerate(tensors) if t is not None}

    def name(value):
        if hasattr(value, "block_shape"):
            return [
                name(value.base),
                value.shape,
                value.strides,
                value.block_shape,
                str(getattr(value, "layout", "")),
                str(getattr(value, "round_f32_to_tf32", False)),
            ]
        if isinstance(value, torch.Tensor):
            return names.setdefault(value.data_ptr(), f"allocation {len(names)}"), value.dtype
        return str(value)

    found = [[name(value) for value in args] for args in started]
    started.clear()
    return found


def compare(title, function, *args) -> bool:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    first = function(*args)
    before = written(tensors)
    others = [torch.randn_like(a) if isinstance(a, torch.Tensor) else a for a in args]
    second = function(*others)
    after = written([a for a in others if isinstance(a, torch.Tensor)])
    same = before == after and (first.shape, first.stride(), first.dtype) == (
        second.shape,
        second.stride(),
        second.dtype,
    )
    kernels = [args[4] for args in before]
    # Who begins before the launch ahead has ended waits for it by itself, and nobody else does; nor does the first.  Copies for
    # aten are passes of their own.
    waits = [
        i > 0 and "left" not in title and name.startswith(("tconv_shift", "tconv_blocks", "tconv_arrange"))
        for i, name in enumerate(kernels)
    ]
    apart = [name for name, own, args in zip(kernels, waits, before) if args[6] != str(own)]
    apart += [name for name in kernels if "lies" in title and "forward" in title and "pack" in name]
    if apart:
        print(f"  wrong about overlapping launches: {', '.join(apart)}")
    print(f"{title}: {'the same' if same else 'DIFFERENT'}, {', '.join(kernels)}", flush=True)
    for one, other in zip(before, after, strict=False):
        for i, pair in enumerate(zip(one, other, strict=False)):
            if pair[0] != pair[1]:
                print(f"  argument {i} of {one[4]}: {pair[0]} and {pair[1]}")
    return same and bool(before) and not apart


def both_gradients(*args):
    return torch.cat([t.flatten() for t in launch.gradients(*args, (True, True))])


def main() -> int:
    properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    driver.set_active(Driver(GPUTarget("cuda", 90, 32), properties, Launcher))
    target = Target("cuda", 90, 132, tuple(map(int, triton.__version__.split(".")[:2])), ("aten",))
    dispatch.target_of = launch.target_of = lambda device: target
    good = True
    for title, size, groups, dtype, last in (
        ("copied", (8, 64, 32, 64), 1, torch.float16, False),
        ("staged and folded", (8, 64, 64), 1, torch.float32, False),
        ("bulk", (2, 64, 8, 16, 16), 1, torch.bfloat16, True),
        ("a weight as it lies", (8, 64, 64, 64), 1, torch.bfloat16, True),
        ("a weight as it lies, strips of a copy", (32, 512, 16, 16), 1, torch.float16, True),
        ("direct", (2, 64, 16, 16), 64, torch.float32, False),
        ("groups", (2, 64, 16, 16), 2, torch.float16, True),
        ("wide groups", (1, 512, 64, 64), 4, torch.float16, False),
        ("strips of a copy, in parts", (32, 768, 6, 6), 1, torch.float16, False),
        ("small", (1, 64, 4, 4), 1, torch.float32, True),
        ("few outputs", (4, 64, 32, 32), 1, torch.float32, False),
        ("few outputs", (4, 63, 32, 31), 1, torch.bfloat16, True),
        ("long strides", (2, 21, 16, 16), 21, torch.float16, False),
        ("blocks", (2, 64, 64, 64), 1, torch.bfloat16, False),
        ("blocks", (2, 64, 64, 64), 1, torch.float32, True),
        ("rounded by copies", (2, 64, 64, 64), 1, torch.float32, True),
    ):
        n = len(size) - 2
        stride = {"staged and folded": 4, "long strides": 32}.get(title, 2)
        kernel = 64 if title == "long strides" else 4
        kernel, padding = (2, 0) if title == "blocks" else (kernel, 1)
        geometry = Geometry((kernel,) * n, (stride,) * n, (padding,) * n, (0,) * n, groups, (1,) * n)
        form = {2: torch.channels_last, 3: torch.channels_last_3d}[n] if last else torch.contiguous_format
        x = torch.randn(size).to(dtype).contiguous(memory_format=form)
        c_out = {
            "wide groups": 256,
            "a weight as it lies, strips of a copy": 256,
            "few outputs": 3,
            "long strides": 21,
        }.get(title, 64)
        w = torch.randn(size[1], c_out // groups, *geometry.kernel).to(dtype)
        w = w.contiguous(memory_format=form) if "as it lies" in title else w
        bias = torch.randn(c_out).to(dtype)
        y = layouts.empty_output(x, w, geometry.output_size(size[2:]), c_out).zero_()
        good &= compare(f"{title} forward", launch.forward, x, w, bias, geometry)
        good &= compare(f"{title} forward without bias", launch.forward, x, w, None, geometry)
        good &= compare(f"{title} backward_input", launch.backward_input, y, w, size[2:], geometry)
        good &= compare(f"{title} backward_weight", launch.backward_weight, y, x, geometry)
        good &= compare(f"{title} backward_bias", launch.backward_bias, y)
    record.forget()
    launch.target_of = lambda device: replace(target, without=())
    good &= compare("left backward_weight", launch.backward_weight, y.contiguous(), x.contiguous(), geometry)
    half = [t.contiguous().bfloat16() for t in (y, x, w)]
    good &= compare("left gradients", both_gradients, *half, geometry)
    launch.target_of = lambda device: target
    # A hook of Triton's that somebody has set sees repeated launches as well.
    seen: list = []
    hook = seen.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    good &= compare("hooked forward", launch.forward, x, w, bias, geometry)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    hooked = len(record.find(next(reversed(record._records)))._steps)
    if len(seen) != 2 * hooked:
        print(f"{len(seen)} of {2 * hooked} launches were seen by a hook")
        good = False
    print(f"Triton {triton.__version__}: {len(record._records)} records")
    record.forget()
    # Other facts, another record: alignment, strides, the bias, torch's precision flag.
    x = x.clone(memory_format=torch.contiguous_format)
    calls = [
        (x, w, bias),
        (torch.randn(x.numel() + 1)[1:].view_as(x), w, bias),
        (x.transpose(2, 3), w, bias),
        (x, w.transpose(2, 3), bias),
        (x, w, None),
    ]
    for args in calls:
        launch.forward(*args, geometry)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    launch.forward(*calls[0], geometry)
    # A tensor that plays two parts leaves no record: in a later call, two may.  Overlapping rows take no bulk copies.
    launch.backward_weight(x, x, Geometry((3, 3), (1, 1), (1, 1), (0, 0), 1, (1, 1)))
    overlapping = torch.randn(8, 64, 144).half().unfold(2, 64, 1)
    assert layouts.vector(overlapping, "width") == 1
    if len(record._records) != len(calls) + 1:
        print(f"{len(record._records)} records of {len(calls) + 1} kinds of call")
        good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
