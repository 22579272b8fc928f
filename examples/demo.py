"""tconv on a published generator and a real photograph; `make demo` runs this.

The photograph is covered with lettering.  pix2pix's U-Net, fitted to the pixels that still show, fills in the others,
since the network's structure alone favours natural pictures (Ulyanov et al., "Deep Image Prior", 2018).  With the
fitted model, torch's transposed convolutions and tconv's are compared layer by layer and as a whole.

A GPU fits and runs the generator in its published size on tconv's kernels.  A CPU takes a smaller one: there tconv
leaves the layers to torch, and Triton's interpreter runs the kernels, on the fitted model, in a process of its own.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import photo
import torch
import torch.nn.functional as F
from interpreted import relative_error
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from unet import UNet

import tconv

# Bounds on the largest error relative to the largest value.  Torch and tconv both round fp32 operands to TF32 unless
# told otherwise, to a unit of 2^-10 (1e-3); the norms between the generator's layers can enlarge what that leaves.
LAYER_BOUND = 2e-3
MODEL_BOUND = 2e-2

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def progress_bar() -> Progress:
    """A bar with a count and the time so far."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def fit(model: nn.Module, noise: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, steps: int) -> None:
    """Fit model(noise) to the pixels that show; fresh noise added at each step keeps it from learning them by heart."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps, pct_start=0.1)
    with progress_bar() as progress:
        task = progress.add_task("fitting", total=steps)
        for step in range(1, steps + 1):
            loss = photo.loss(model(noise + 0.03 * torch.randn_like(noise)), target, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 0 or step == steps:
                progress.update(task, completed=step, description=f"fitting, loss {loss.item():.4f}")


def median_ms(function, device: torch.device) -> float:
    """The median time of a call in milliseconds after warming up: CUDA events on a GPU, else the clock."""
    times = []
    for _ in range(60 if device.type == "cuda" else 10):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[len(times) // 5 :])


def show_explanation(model: nn.Module, noise: torch.Tensor) -> None:
    """Print which kernel runs each layer, and why."""
    table = Table("layer", "what it is", "kernel", "why", title="What runs (tconv.explain)")
    for layer in tconv.explain(model, noise).layers:
        plan = layer.passes[0].plan
        shape = "x".join(map(str, layer.input_shape))
        table.add_row(layer.module, f"{layer.layer}\n  input {shape}", plan.family, plan.reason)
    console.print(table)


def compare_layers(model: nn.Module, noise: torch.Tensor) -> dict[str, float]:
    """Run each transposed convolution on its own input with torch and with tconv; return tconv's errors by layer."""
    calls = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: calls.update({name: (layer, inputs[0])}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.ConvTranspose2d)
    ]
    with torch.no_grad():
        model(noise)
    for hook in hooks:
        hook.remove()
    table = Table("layer", "torch error", "tconv error", "torch ms", "tconv ms", title="Against float64, and timed")
    errors = {}
    for name, (layer, x) in calls.items():
        call, where = (x, layer.weight.detach(), layer.bias.detach()), (layer.stride, layer.padding)
        exact = F.conv_transpose2d(*(t.double() for t in call), *where)
        runs = [lambda f=f, c=call, w=where: f(*c, *w) for f in (F.conv_transpose2d, tconv.conv_transpose2d)]
        both = [relative_error(run(), exact) for run in runs]
        errors[name] = both[1]
        table.add_row(name, *(f"{e:.1e}" for e in both), *(f"{median_ms(run, x.device):.3f}" for run in runs))
    console.print(table)
    return errors


def time_models(plain: nn.Module, converted: nn.Module, noise: torch.Tensor, target: torch.Tensor) -> None:
    """Print the whole generator's times on torch and on tconv."""
    table = Table("whole generator", "torch ms", "tconv ms")
    for name, train in (("forward", False), ("forward and backward", True)):
        times = []
        for model in (plain, converted):

            def run(model=model, train=train):
                with torch.set_grad_enabled(train):
                    loss = (model(noise) - target).square().mean()
                if train:
                    loss.backward()

            times.append(median_ms(run, noise.device))
        table.add_row(name, *(f"{t:.2f}" for t in times))
    console.print(table)


def interpret(config: dict, model: nn.Module, noise: torch.Tensor) -> dict:
    """Run interpreted.py on the fitted model, which takes half a minute or more, and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "model.pt"), Path(folder, "result.pt")
        torch.save({"config": config, "state": model.state_dict(), "noise": noise}, request)
        command = [sys.executable, Path(__file__).with_name("interpreted.py"), request, result]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        with (
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child,
            progress_bar() as progress,
        ):
            for _ in progress.track(child.stdout, total=config["depth"], description="interpreting layers"):
                pass
        if child.returncode:
            sys.exit("interpreted.py failed")
        return torch.load(result)


def show_interpreted(result: dict) -> dict[str, float]:
    """Print what the kernels did in the interpreter; return their errors."""
    table = Table("layer", "kernel", "why", "error", title="tconv's kernels in Triton's interpreter, against float64")
    for name, kernel, why, error in result["layers"]:
        table.add_row(name, kernel, why, f"{error:.1e}")
    console.print(table)
    console.print(
        "A cut-down layer in the interpreter, forward and backward:", result["explanation"], sep="\n", soft_wrap=True
    )
    console.print("  errors: " + ", ".join(f"{name} {error:.1e}" for name, error in result["passes"]))
    errors = {f"{name} in the interpreter": error for name, _, _, error in result["layers"]}
    return errors | {f"the cut-down layer's {name}": error for name, error in result["passes"]}


def show_versions(device: torch.device) -> bool:
    """Print what is installed; return whether Triton is."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(f"tconv {tconv.__version__}, torch {torch.__version__}, triton {triton or 'missing'}, device: {name}")
    return triton is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    parser.add_argument("--steps", type=int, help="optimiser steps; default 400 on a GPU, 300 on a CPU")
    parser.add_argument("--size", type=int, help="pixels a side, a power of 2; default 256 on a GPU, 128 on a CPU")
    parser.add_argument("--output", type=Path, default=Path("out/demo.png"), help="the picture; default %(default)s")
    options = parser.parse_args()
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    size, steps = options.size or (256 if gpu else 128), options.steps or (400 if gpu else 300)
    if size < 64 or size & (size - 1):
        parser.error(f"expected --size to be a power of 2 and at least 64, got {size}")
    if steps < 20:
        parser.error(f"expected --steps to be at least 20, got {steps}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET; the demo starts the interpreter itself, for a part of its work")

    has_triton = show_versions(device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # torch at its best
    if not gpu:
        torch.set_num_threads(1)  # as fast as several on a model this small, and other programs cannot hold it up

    config = {"in_channels": 8, "width": 64 if gpu else 16, "depth": size.bit_length() - 1 if gpu else 5}
    converted = UNet(**config).to(device)
    console.print(f"U-Net {config}, {sum(p.numel() for p in converted.parameters()) / 1e6:.1f} million parameters")
    console.print(str(tconv.convert(converted)))
    target, mask = photo.load(size).to(device), photo.lettering(size).to(device)
    noise = 0.1 * torch.rand(1, config["in_channels"], size, size, device=device)
    show_explanation(converted, noise)

    fit(converted, noise, target, mask, steps)
    plain = copy.deepcopy(converted)
    tconv.revert(plain)
    errors = compare_layers(plain, noise)
    time_models(plain, converted, noise, target)
    with torch.no_grad():
        torchs, ours = plain(noise), converted(noise)
    where = f"tconv on {torch.cuda.get_device_name(device)}" if gpu else "tconv, which leaves CPUs to torch"
    if not gpu:
        console.print("On a CPU tconv hands every layer to torch: both columns time the same code, no gain is claimed.")
        if has_triton:
            result = interpret(config, converted, noise)
            errors |= show_interpreted(result)
            ours, where = result["image"], "tconv's kernels, interpreted"

    difference = relative_error(ours, torchs.double())
    hidden = [photo.psnr(image, target, 1 - mask) for image in (torchs, ours)]
    console.print(f"Hidden pixels filled in to {hidden[0]:.2f} dB of PSNR (torch) and {hidden[1]:.2f} dB ({where})")
    photo.draw(options.output, target, mask, {"filled in, torch": torchs, f"filled in,\n{where}": ours})
    console.print(f"Wrote {options.output}")
    failed = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= LAYER_BOUND]
    if not difference <= MODEL_BOUND:
        failed.append(f"the generator's output: {difference:.1e}")
    console.print(f"Errors: layers at most {max(errors.values()):.1e} (bound {LAYER_BOUND:.0e}), ", end="")
    console.print(f"torch's picture and tconv's at most {difference:.1e} apart (bound {MODEL_BOUND:.0e})")
    if failed:
        sys.exit("out of bounds: " + "; ".join(failed))


if __name__ == "__main__":
    main()
