"""A pass's launches, recorded at its first call and carried out again at the calls that are like it.

Deciding on a plan and having Triton look at some forty arguments takes the host longer than the kernels of many a layer
run.  All of it follows from facts of the tensors (sizes, strides, dtype, device, alignment) and of the layer; a Record
keeps what came of it: what to allocate, and the compiled kernels with their arguments, of which only tensors change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Multiplications and additions become one instruction: asked for, as Triton 3.10 will not do it by itself (and 3.9 warns).
FUSED = {"enable_fp_fusion": True}


def on_device(t: torch.Tensor):
    """Triton launches on the current device; this makes it the tensor's."""
    if t.device.type == "cuda" and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


class Described(NamedTuple):
    """A tensor as bulk copies take it, with the facts of Triton's TensorDescriptor."""

    base: torch.Tensor
    facts: tuple  # shape, strides, block_shape, layout; where copies round to TF32 also padding and True


def _described(base: torch.Tensor, facts: tuple):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(base, *facts)


class Record:
    """The launches of one pass, built by carrying it out: `result` and `workspace` allocate, `launch` launches, and all
    take note; `keep` or `leave` ends it.  `again` repeats it on other tensors of the same facts."""

    def __init__(self, *tensors: torch.Tensor | None):
        """tensors: those of the call, in the order in which `again` will be given others; the first is on the device."""
        self._known: list[torch.Tensor | None] = list(tensors)
        self._allocations: list[dict[str, Any]] = []  # arguments of torch.empty
        # Parts of tensors, and how to cut them again: (which of the known tensors, dimension, first, how many).
        self._parts: list[torch.Tensor] = []
        self._cuts: list[tuple[int, int, int, int]] = []
        self._steps: list[tuple] = []
        self._left: Callable[[tuple], torch.Tensor] | None = None  # makes the result where no step does
        # Whether every launch can be repeated: not those of a tensor that plays two parts, which others need not play.
        self._complete = len({id(t) for t in tensors if t is not None}) == sum(t is not None for t in tensors)

    def _empty(self, **how) -> torch.Tensor:
        made = torch.empty(**how)
        self._known.append(made)
        self._allocations.append(how)
        return made

    def result(self, size, like: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
        """The uninitialised result, of like's dtype and device; to be asked for first."""
        return self._empty(size=tuple(size), dtype=like.dtype, device=like.device, memory_format=memory_format)

    def workspace(
        self, size, dtype: torch.dtype, like: torch.Tensor, memory_format=torch.contiguous_format
    ) -> torch.Tensor:
        """An uninitialised tensor for the time of the call, on like's device."""
        return self._empty(size=size, dtype=dtype, device=like.device, memory_format=memory_format)

    def part(self, t: torch.Tensor | None, dim: int, index: int, count: int) -> torch.Tensor | None:
        """The index-th of `count` equal parts of one of the tensors along a dimension, for launches to take."""
        if t is None:
            return None
        size = t.shape[dim] // count
        self._cuts.append((self._place(t), dim, index * size, size))
        self._parts.append(t.narrow(dim, index * size, size))
        return self._parts[-1]

    def _place(self, t: torch.Tensor | None) -> int:
        """Where `again` has a tensor: parts are counted from the end."""
        for n, each in enumerate(self._known):
            if each is t:
                return n
        return -1 - next(n for n, each in enumerate(self._parts) if each is t)

    def launch(self, kernel, grid: int | tuple[int, int], *args, **constants) -> None:
        """Launch `kernel` on `grid` programs.  Tensors among the arguments are the call's or were allocated here."""
        grid = (grid, 1) if isinstance(grid, int) else grid
        real = [_described(*a) if isinstance(a, Described) else a for a in args]
        compiled = kernel[grid](*real, **constants, **FUSED)
        if not hasattr(compiled, "__getitem__"):  # the interpreter compiles nothing
            self._complete = False
            return
        named = dict(zip(kernel.arg_names, args)) | constants
        values = [named[name] for name in kernel.arg_names]
        places = []  # (position, which of the known tensors, its descriptor's facts)
        for i, value in enumerate(values):
            base, facts = value if isinstance(value, Described) else (value, None)
            if isinstance(base, torch.Tensor):
                places.append((i, self._place(base), facts))
                values[i] = None  # a record keeps no tensor alive
        self._steps.append((compiled[(grid[0], grid[1], 1)], values, places))

    def keep(self, key: tuple) -> torch.Tensor:
        """Let `find` find this, if it can be repeated; returns the result."""
        result = self._known[-len(self._allocations)]
        assert result is not None
        self._known, self._parts = [], []
        if self._complete:
            _keep(key, self)
        return result

    def leave(self, key: tuple, function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        """End with the result that `function` makes of `inputs`, which are the call's tensors or were allocated here,
        in the memory format of the one that was asked for; let `find` find this."""
        places = tuple(map(self._place, inputs))
        result = self._known[-len(self._allocations)]
        assert result is not None
        promised, format = result.stride(), self._allocations[0]["memory_format"]
        if len(self._allocations) == 1 and not any(t is result for t in inputs):
            self._allocations = []  # the function allocates its result by itself
        self._known = []

        def make(*inputs) -> torch.Tensor:
            made = function(*inputs).contiguous(memory_format=format)
            # Of dimensions of size 1 the strides can differ.
            return made if made.stride() == promised else made.as_strided(made.shape, promised)

        self._left = lambda known: make(*(known[n] for n in places))
        if self._complete:
            _keep(key, self)
        return make(*inputs)

    def again(self, *tensors: torch.Tensor | None) -> torch.Tensor:
        """Carry it out on other tensors; returns the result."""
        first = tensors[0]
        assert first is not None
        with on_device(first):
            known = *tensors, *(torch.empty(**how) for how in self._allocations)
            if self._cuts:
                known += tuple(known[n].narrow(*cut) for n, *cut in reversed(self._cuts))  # type: ignore[union-attr]
            for start, values, places in self._steps:
                args = values.copy()
                for i, at, facts in places:
                    args[i] = known[at] if facts is None else _described(known[at], facts)
                start(*args)
        if self._left:
            return self._left(known)
        result = known[len(tensors)]
        assert result is not None
        return result


MOST_RECORDS = 4096  # then all are forgotten, so that ever new sizes do not fill the memory
_records: dict[tuple, Record] = {}
find = _records.get


def _keep(key: tuple, record: Record) -> None:
    if len(_records) >= MOST_RECORDS:
        forget()
    _records[key] = record


def forget() -> None:
    """Drop all records: the next call of every kind decides anew."""
    _records.clear()


def facts(*tensors: torch.Tensor | None) -> tuple:
    """What launches depend on of tensors, values aside.  No kernel asks for an alignment of more than 64 bytes."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 64) for t in tensors)
