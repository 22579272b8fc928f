"""The kernels for Hopper GPUs on a list of layers, for compute-sanitizer (`make sanitize`): every way in which the input, the weight and the
output come and go, in the three precisions that differ.

    compute-sanitizer --tool memcheck --kernel-regex kns=tconv python tests/sanitized.py

Two numbers, i and n, leave of the list every n-th layer from the i-th on: n processes compile the kernels sooner than one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from oracle import ATEN

import tconv
from tconv import dispatch

# (input, weight, options, whether channels_last)
LAYERS = {
    "rows": ((2, 64, 64, 62), (64, 64, 4, 4), dict(stride=2, padding=1), False),
    "rows, channels_last": ((2, 64, 64, 62), (64, 64, 4, 4), dict(stride=2, padding=1), True),
    "strips of a copy": ((32, 512, 8, 6), (512, 256, 4, 4), dict(stride=2, padding=1), False),
    "strips as they lie": ((8, 256, 14, 14), (256, 256, 2, 2), dict(stride=2), True),
    "phases that differ": ((2, 128, 32, 32), (128, 96, 3, 3), dict(stride=2, padding=1, output_padding=1), True),
    "eight warps together": ((4, 128, 60, 60), (128, 64, 3, 3), dict(padding=1), False),
    "long strides": ((4, 128, 400), (128, 64, 16), dict(stride=8, padding=4), False),
    "a stride of seven": ((2, 256, 300), (256, 128, 14), dict(stride=7, padding=4, output_padding=1), False),
    "sums in parts": ((1, 512, 12, 12), (512, 128, 4, 4), dict(stride=2, padding=1), True),
    "depth": ((1, 64, 5, 17, 20), (64, 32, 3, 3, 3), dict(stride=2, padding=1, output_padding=1), True),
    "few channels": ((2, 48, 40, 44), (48, 20, 3, 3), dict(stride=2, padding=1, output_padding=1), False),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Those of the block kernel.
BLOCKS = {
    "blocks": ((4, 128, 64, 64), (128, 64, 2, 2), dict(stride=2), False),
    "blocks, channels_last": ((4, 128, 64, 64), (128, 64, 2, 2), dict(stride=2), True),
    "blocks, several rows in a box": ((2, 72, 10, 16, 8), (72, 40, 2, 2, 2), dict(stride=2), False),
    "blocks, rows beside the end of a box": ((4, 64, 24, 60), (64, 32, 4, 4), dict(stride=4), True),
}
# Those of the row kernel, whose blocks write to global memory what their other threads read.
STRIPS = {
    "strips of rows": ((1, 128, 192, 352), (128, 3, 5, 5), dict(stride=2, padding=2, output_padding=1), False),
    "strips of rows, channels_last": ((4, 64, 131, 130), (64, 2, 4, 4), dict(stride=2, padding=1), True),
}
# Weights' gradients on a grid, in fp32.
GRIDS = {
    "a grid": ((3, 96, 20, 21), (96, 40, 3, 3), dict(stride=2, padding=1, output_padding=1), False),
    "a grid, channels_last": ((2, 64, 5, 9, 16), (64, 64, 2, 2, 2), dict(stride=2), True),
    "a grid, tiles of all channels": ((16, 256, 16, 16), (256, 128, 4, 4), dict(stride=2, padding=1), False),
    "a grid, two taps a program": ((2, 96, 40, 48), (96, 48, 5, 5), dict(stride=2, padding=2), False),
    "a grid, four taps a program": ((8, 128, 48, 48), (128, 32, 3, 3), dict(padding=1), False),
}
TOLERANCE = {"bf16": 1e-2, "tf32": 2e-3, "fp32": 2e-6}  # of the largest element; what the errors are other tests say


def main(first: int = 0, step: int = 1) -> int:
    torch.manual_seed(0)
    wrong = 0
    for title, (size, kernel, options, last) in list((LAYERS | BLOCKS | STRIPS).items())[first::step]:
        family = "blocks" if title in BLOCKS else "rows" if title in STRIPS else "shift"
        others = [name for name in ("few", "rows", "columns", "long", "patches", "blocks") if name != family]
        x, w = torch.randn(size), torch.randn(kernel) / kernel[0] ** 0.5
        exact = ATEN[len(size) - 2](x.double(), w.double(), **options)
        for precision in TOLERANCE:
            if precision == "fp32" and family != "shift":
                continue
            torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            form = FORMATS[len(size)] if last else torch.contiguous_format
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            tensors = [t.to("cuda", dtype).contiguous(memory_format=form) for t in (x, w)]
            with dispatch.without(*others, "aten"):
                plan = tconv.explain(*tensors, **options).passes[0].plan
                y = getattr(tconv, f"conv_transpose{len(size) - 2}d")(*tensors, **options)
            wrong += is_wrong(title, precision, plan, family, y, exact)
    return 1 if wrong + sum(map(wrong_gradients, list(GRIDS)[first::step])) else 0


def is_wrong(title: str, precision: str, plan, family: str, found, exact) -> bool:
    """Whether a pass ran on another family, or with too large an error; tells it."""
    error = ((found.cpu().double() - exact).abs().max() / exact.abs().max()).item()
    good = plan.family == family and error < TOLERANCE[precision]
    what = plan.config.describe() if plan.family == family else plan.reason
    print(f"{'ok' if good else 'WRONG'} {title}, {precision}: error {error:.1e}, {what}", flush=True)
    return not good


def wrong_gradients(title: str) -> int:
    """In how many precisions a weight's gradient on a grid is wrong."""
    size, kernel, options, last = GRIDS[title]
    function, form, wrong = ATEN[len(size) - 2], FORMATS[len(size)] if last else torch.contiguous_format, 0
    x, w = torch.randn(size), torch.randn(kernel)
    grad = torch.randn_like(function(x, w, **options))
    leaf = w.double().requires_grad_()
    exact = torch.autograd.grad(function(x.double(), leaf, **options), leaf, grad.double())[0]
    for precision in ("tf32", "fp32"):
        torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        tensors = [t.cuda().contiguous(memory_format=form) for t in (x, w, grad)]
        leaf = tensors[1].requires_grad_()
        with dispatch.without("few", "columns", "long", "patches", "aten"):
            plan = tconv.explain(*tensors[:2], **options).passes[2].plan
            y = getattr(tconv, f"conv_transpose{len(size) - 2}d")(tensors[0], leaf, **options)
            found = torch.autograd.grad(y, leaf, tensors[2])[0]
        wrong += is_wrong(title, precision, plan, "grid", found, exact)
    return wrong


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
