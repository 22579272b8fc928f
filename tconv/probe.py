"""Whether this Triton and this GPU see shared memory as the shift kernel does.

The kernel multiplies a tile of pixels seen some rows further on, a view that Triton has to take at its word and that every release
spells in a way of its own.  So before a Hopper GPU gets the Hopper kernels, a tiny product at odd offsets is compared with what it
must be; where it is not, or does not compile, `dispatch` takes the kernels of every GPU, and explain() says why.
"""

from __future__ import annotations

import functools

import torch

from .record import FUSED, on_device
from .shift import M, Probed

PROBED = "the probe of the shift kernel's view of shared memory"


def sample(device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels no two of which are alike, a weight that passes them on as they are, and NaN for their products."""
    p = Probed()
    numbers = torch.arange(p.ring * p.kb, device=device).view(p.ring, p.kb)
    x = ((numbers * 37 + numbers // p.kb * 11) % 257 - 128).to(torch.bfloat16)  # whole numbers that bf16 has
    weight = torch.eye(M, p.kb, device=device, dtype=torch.bfloat16)
    nothing = torch.full((len(p.shifts), p.stages, M, p.pixels), torch.nan, device=device, dtype=torch.float32)
    return x, weight, nothing


def expected(x: torch.Tensor) -> torch.Tensor:
    """The products of a sample's pixels."""
    p = Probed()
    firsts = [stage * p.pitch + offset for offset in p.shifts for stage in range(p.stages)]
    return torch.stack([x[n : n + p.pixels].T for n in firsts]).view(len(p.shifts), p.stages, M, p.pixels).float()


def launch(x: torch.Tensor, weight: torch.Tensor, products: torch.Tensor) -> None:
    """Run the kernel on a sample."""
    from .kernels import probe as kernels

    with on_device(x):
        kernels.probe[(1,)](x, weight, products, Probed(), num_warps=4, **FUSED)


@functools.cache
def fault(device: torch.device) -> str:
    """What is wrong with the views of shared memory on a Hopper GPU under the Triton that is installed, or ""; of each device it is
    found out once, in a few milliseconds where Triton has the kernel compiled."""
    try:
        x, weight, products = sample(device)
        launch(x, weight, products)
        wrong = int((products != expected(x)).sum())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may raise
        return f"{PROBED} failed: {type(error).__name__}: {str(error)[:200]}"
    return f"{PROBED} found {wrong} of {products.numel()} products wrong" if wrong else ""
