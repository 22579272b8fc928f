"""A pass's launches, recorded at its first call and carried out again at the calls that are like it.

Deciding on a plan and having Triton look at some forty arguments takes the host longer than the kernels of many a layer
run.  All of it follows from facts of the tensors (sizes, strides, dtype, device, alignment) and of the layer; a Record
keeps what came of it: what to allocate, and the compiled kernels with their arguments, of which only tensors change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

# Multiplications and additions become one instruction: asked for, as Triton 3.10 will not do it by itself (and 3.9 warns).
FUSED = {"enable_fp_fusion": True}


def _is_elsewhere(t: torch.Tensor) -> bool:
    return t.is_cuda and t.device.index != torch._C._cuda_getDevice()


def on_device(t: torch.Tensor):
    """Triton launches on the current device; this makes it the tensor's."""
    return torch.cuda.device(t.device) if _is_elsewhere(t) else contextlib.nullcontext()


class Described(NamedTuple):
    """A tensor as bulk copies take it, with the facts of Triton's TensorDescriptor."""

    base: torch.Tensor
    facts: tuple  # shape, strides, block_shape; for Gluon's kernels also layout, and where copies round to TF32 padding and True


def _described(base: torch.Tensor, facts: tuple):
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (TensorDescriptor if len(facts) == 3 else GluonDescriptor)(base, *facts)


def _described_again(base: torch.Tensor | None, like):
    """`like` of another tensor, without the checks that its own facts have passed: they take as long as a launch."""
    made = object.__new__(type(like))
    made.__dict__.update(like.__dict__, base=base)
    return made


@cache
def _triton() -> tuple:
    """Triton's driver and run-time settings: to import them at each launch would take as long as the rest of it."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


class Step(NamedTuple):
    """A launch: Triton's compiled kernel, what of it a launch takes, and the arguments."""

    compiled: Any
    run: Callable
    function: Any
    metadata: Any
    grid: tuple[int, int, int]
    values: list  # None where a tensor has its place
    places: list[tuple[int, int, Any]]  # (position, which of the known tensors, a descriptor like its own or None)


class Record:
    """The launches of one pass, built by carrying it out: `result` and `workspace` allocate, `launch` launches, and all
    take note; `keep`, `leave` or `end` ends it.  `again` repeats it on other tensors of the same facts."""

    def __init__(self, *tensors: torch.Tensor | None):
        """tensors: those of the call, in the order in which `again` will be given others; the first is on the device."""
        self._known: list[torch.Tensor | None] = list(tensors)
        self._allocations: list[dict[str, Any]] = []  # arguments of torch.empty
        # Parts of tensors, and how to cut them again: (which of the known tensors, dimension, first, how many).
        self._parts: list[torch.Tensor] = []
        self._cuts: list[tuple[int, int, int, int]] = []
        self._steps: list[Step] = []
        self._left: Callable[[tuple], torch.Tensor] | None = None  # makes the result where no step does
        # Whether every launch can be repeated: not those of a tensor that plays two parts, which others need not play.
        self.repeatable = len({id(t) for t in tensors if t is not None}) == sum(t is not None for t in tensors)

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
            self.repeatable = False
            return
        named = dict(zip(kernel.arg_names, real)) | constants
        values = [named[name] for name in kernel.arg_names]
        places: list[tuple[int, int, Any]] = []
        for i, value in enumerate(values):
            base = getattr(value, "base", None)
            if isinstance(value, torch.Tensor):
                places.append((i, self._place(value), None))
                values[i] = None  # a record keeps no tensor alive
            elif isinstance(base, torch.Tensor):
                places.append((i, self._place(base), _described_again(None, value)))
                values[i] = None
        of_kernel = compiled.run, compiled.function, compiled.packed_metadata
        self._steps.append(Step(compiled, *of_kernel, (*grid, 1), values, places))

    def keep(self, key: tuple | None) -> torch.Tensor:
        """Let `find` find this, if it can be repeated and there is a key; returns the result."""
        result = self._known[-len(self._allocations)]
        assert result is not None
        self._known, self._parts = [], []
        if self.repeatable and key is not None:
            keep(key, self)
        return result

    def end(self) -> tuple[Any, ...]:
        """The call's tensors and those allocated, as `replay` returns them: for who keeps the record himself, if it is repeatable."""
        known, self._known, self._parts = tuple(self._known), [], []
        return known

    def leave(self, key: tuple, function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        """End with the result that `function` makes of `inputs`, which are the call's tensors or were allocated here,
        in the memory format of the one that was asked for; let `find` find this."""
        places = tuple(map(self._place, inputs))
        result = self._known[-len(self._allocations)]
        assert result is not None
        as_it = promised(result, self._allocations[0]["memory_format"])
        if len(self._allocations) == 1 and not any(t is result for t in inputs):
            self._allocations = []  # the function allocates its result by itself
        self._known = []

        def make(*inputs) -> torch.Tensor:
            return as_it(function(*inputs))

        self._left = lambda known: make(*(known[n] for n in places))
        if self.repeatable:
            keep(key, self)
        return make(*inputs)

    def again(self, *tensors: torch.Tensor | None) -> torch.Tensor:
        """Carry it out on other tensors; returns the result."""
        known = self.replay(*tensors)
        if self._left:
            return self._left(known)
        return known[len(tensors)]

    def replay(self, *tensors: torch.Tensor | None) -> tuple[Any, ...]:
        """Launch on other tensors what was launched; returns them and what was allocated."""
        first = tensors[0]
        assert first is not None
        if _is_elsewhere(first):
            with torch.cuda.device(first.device):
                return self.replay(*tensors)
        known = *tensors, *[torch.empty(**how) for how in self._allocations]
        if self._cuts:
            known += tuple(known[n].narrow(*cut) for n, *cut in reversed(self._cuts))  # type: ignore[union-attr]
        if self._steps:
            self._launch_again(known)
        return known

    def _launch_again(self, known: tuple) -> None:
        driver, knobs = _triton()
        device = driver.active.get_current_device()
        stream = driver.active.get_current_stream(device)
        # Triton has a chain of hooks around each launch, whose calls take time even where there are none.
        hooks = knobs.launch_enter_hook, knobs.launch_exit_hook
        watched = any(getattr(hook, "calls", hook) for hook in hooks)
        for compiled, run, function, metadata, grid, values, places in self._steps:
            args = values.copy()
            for i, at, like in places:
                args[i] = known[at] if like is None else _described_again(known[at], like)
            if watched:
                compiled[grid](*args)
            else:
                run(*grid, stream, function, metadata, None, None, None, *args)


def promised(like: torch.Tensor, format: torch.memory_format) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes of results of like's shape, in whatever layout, ones in its memory format with its strides."""
    strides = like.stride()

    def make(result: torch.Tensor) -> torch.Tensor:
        made = result.contiguous(memory_format=format)
        # Of dimensions of size 1 the strides can differ.
        return made if made.stride() == strides else made.as_strided(made.shape, strides)

    return make


MOST_RECORDS = 4096  # then all are forgotten, so that ever new sizes do not fill the memory
_records: dict[tuple, Any] = {}  # Records, and what launch.gradients has found
find = _records.get


def keep(key: tuple, record: Any) -> None:
    """Let `find` find a Record, or what else follows from the facts in `key`."""
    if len(_records) >= MOST_RECORDS:
        forget()
    _records[key] = record


def forget() -> None:
    """Drop all records: the next call of every kind decides anew."""
    _records.clear()


def facts(*tensors: torch.Tensor | None) -> tuple:
    """What launches depend on of tensors, values aside.  No kernel asks for an alignment of more than 64 bytes."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 64) for t in tensors)
