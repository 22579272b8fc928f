"""Whether this Triton and this GPU see shared memory as the shift kernel does.

The kernel multiplies a tile of pixels seen some rows further on, a view that Triton has to take at its word and that every release
spells in a way of its own.  So before a GPU gets the Hopper kernels, a tiny product at several offsets is compared with what it
must be; where it is not, or does not compile, `dispatch` takes the kernels of every GPU, and explain() says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import record
from .shift import M, Probed

TILES = {2: Probed("bf16", 2), 4: Probed("tf32", 4)}  # by bytes of an element
_found: dict[tuple[torch.device, int], str] = {}


def sample(tile: Probed, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels no two of which have a channel in common, a weight that passes them on as they are, and NaN for the products."""
    numbers = torch.arange(tile.ring * tile.kb, device=device).view(tile.ring, tile.kb)
    dtype = torch.bfloat16 if tile.size == 2 else torch.float32
    x = ((numbers * 37 + numbers // tile.kb * 11) % 257 - 128).to(dtype)  # whole numbers that bf16 has
    weight = torch.eye(tile.kb, device=device, dtype=dtype).repeat(M // tile.kb, 1)
    size = len(tile.shifts), tile.stages, M, tile.pixels
    return x, weight, torch.full(size, torch.nan, device=device, dtype=torch.float32)


def expected(tile: Probed, x: torch.Tensor) -> torch.Tensor:
    """The products of a sample's pixels."""
    firsts = [stage * tile.pitch + shift for shift in tile.shifts for stage in range(tile.stages)]
    seen = torch.stack([x[n : n + tile.pixels].T for n in firsts]).repeat(1, M // tile.kb, 1).float()
    return seen.view(len(tile.shifts), tile.stages, M, tile.pixels)


def compile(tile: Probed, *tensors: torch.Tensor) -> None:
    """Have Triton make the kernel for such a sample."""
    from .kernels import probe as kernels

    kernels.probe.warmup(*tensors, tile, grid=(1,), num_warps=4, **record.FUSED)


def launch(tile: Probed, *tensors: torch.Tensor) -> None:
    """Run the kernel on a sample."""
    from .kernels import probe as kernels

    kernels.probe[(1,)](*tensors, tile, num_warps=4, **record.FUSED)


def fault(device: torch.device, size: int) -> str | None:
    """What is wrong with the views of shared memory on a Hopper GPU, of elements of `size` bytes, under the Triton that is
    installed, or "".  It is found out once; None until then while a graph is being captured, which would fail, and under a mode,
    which would see it."""
    key = device, size
    if key not in _found:
        if torch._C._len_torch_dispatch_stack() or torch.cuda.is_current_stream_capturing():
            return None
        _found[key] = _probe(TILES[size], device)
    return _found[key]


def _probe(tile: Probed, device: torch.device) -> str:
    tensors = sample(tile, device)
    right = expected(tile, tensors[0])
    with record.on_device(tensors[0]), _waiting_allowed():
        try:
            compile(tile, *tensors)
        except Exception as error:  # whatever a compiler may raise
            told = " ".join(str(error).split())[-200:]  # of Triton's, the source comes first
            return f"the probe of the Hopper kernels does not compile: {type(error).__name__}: {told}"
        launch(tile, *tensors)
        wrong = int((tensors[2] != right).sum())
    return f"{wrong} of {right.numel()} products were wrong in the probe of the Hopper kernels" if wrong else ""


@contextmanager
def _waiting_allowed() -> Iterator[None]:
    """Inside, reading a result does not warn or raise, which the user may have asked for calls of their own."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    if before:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        if before:
            torch.cuda.set_sync_debug_mode(before)
