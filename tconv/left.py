"""What is left to aten by way of channels_last copies.

cuDNN's kernels want channels_last, and of contiguous tensors it makes copies of its own, which take longer than ours; torch's, of a
weight and its gradient, take longer still.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from . import aten, record
from .geometry import Geometry
from .launches.copies import last_form, transpose
from .layouts import is_large, suggested
from .record import Record

_shared = threading.local()  # .copies: what _of_gradient has made inside shared_copies, by what it was made of


def channels_last(t) -> torch.Tensor:
    """A contiguous activation's or weight's copy with its second dimension, whole pieces of 16 bytes, innermost; in fp32 rounded
    to TF32; of the size and format of `last_form`."""
    key = "channels_last", record.facts(t)
    if known := record.find(key):
        return known.again(t)
    noted = Record(t)
    _note_channels_last(noted, t)
    return noted.keep(key)


def _note_channels_last(noted: Record, t) -> None:
    """Launch what `channels_last` does."""
    size, form = last_form(t)
    copy = noted.workspace(size, t.dtype, t, form)
    transpose(noted, t, copy, t.shape[1], prod(size[2:]), t.dtype is torch.float32)


@contextmanager
def shared_copies() -> Iterator[None]:
    """Inside, in this thread, an output's gradient is copied once for both gradients that are made of it."""
    _shared.copies = {}
    try:
        yield
    finally:
        _shared.copies = None


def _of_gradient(t) -> torch.Tensor:
    """channels_last of an output's gradient."""
    copies = getattr(_shared, "copies", None)
    if copies is None:
        return channels_last(t)
    place = t.data_ptr(), record.facts(t)
    if place not in copies:  # t is kept, too, so that no other tensor comes to lie there
        copies[place] = channels_last(t), t
    return copies[place][0]


def contiguous(t) -> torch.Tensor:
    """The contiguous copy of a dense channels_last activation or weight; its pixels, or taps, are whole pieces of 16 bytes."""
    key = "contiguous", record.facts(t)
    if known := record.find(key):
        return known.again(t)
    noted = Record(t)
    _note_contiguous(noted, t)
    return noted.keep(key)


def _note_contiguous(noted: Record, t) -> torch.Tensor:
    """Launch what `contiguous` does."""
    copy = noted.workspace(t.shape, t.dtype, t)
    transpose(noted, t, copy, prod(t.shape[2:]), t.shape[1], False)
    return copy


def backward_input(function, size, grad_output, weight) -> torch.Tensor:
    """What function, of aten.backward_input, makes of channels_last copies; of that size."""
    copy, weight = _of_gradient(grad_output), _of_weight(weight)
    size = size if len(size) > 3 else (*size[:2], 1, size[2])
    like = torch.empty(size, dtype=copy.dtype, device=copy.device, memory_format=suggested(copy))
    made = function(copy, weight, like)
    del like  # its memory is the contiguous copy's
    return _contiguous_if_whole(made)


def backward_weight(function, grad_output, input, like) -> torch.Tensor:
    """What function, of aten.backward_weight, makes of channels_last copies."""
    return _contiguous_if_whole(function(_of_gradient(grad_output), channels_last(input), like))


class Gradients:
    """Both gradients from one call of aten on channels_last copies, of tensors of the same facts at each call.  What is launched before
    and behind aten is recorded together: found and repeated one by one, copies take the host twice as long."""

    def __init__(self) -> None:
        self._before: Record | None = None
        self._behind: tuple[tuple, list[int], Record] | None = (
            None  # facts of what aten made, which of it is copied, and how
        )

    def __call__(self, grad_output, input, weight, geometry: Geometry) -> list[torch.Tensor]:
        tensors, before, behind = (grad_output, input, weight), self._before, self._behind
        copies = (before.replay(*tensors) if before else self._copy(*tensors))[3:]
        made = aten.gradients(copies[0], copies[1], copies[2] if len(copies) > 2 else weight, geometry)
        del copies  # before more is allocated
        if not behind or behind[0] != record.facts(*made):
            return self._lay_back(made)
        _, which, noted = behind
        for i, t in zip(which, noted.replay(*(made[i] for i in which))[len(which) :]):
            made[i] = t
        return made

    def _copy(self, *tensors) -> tuple:
        noted = Record(*tensors)
        for t in tensors if _is_copied(tensors[2]) else tensors[:2]:
            _note_channels_last(noted, t)
        self._before = noted if noted.repeatable else None
        return noted.end()

    def _lay_back(self, made: list[torch.Tensor]) -> list[torch.Tensor]:
        if which := [i for i, t in enumerate(made) if _is_laid_back(t)]:
            facts, noted = record.facts(*made), Record(*(made[i] for i in which))
            for i in which:
                made[i] = _note_contiguous(noted, made[i])
            noted.end()
            self._behind = (facts, which, noted) if noted.repeatable else None
        return made


def _of_weight(weight) -> torch.Tensor:
    """channels_last of a weight that it takes."""
    return channels_last(weight) if _is_copied(weight) else weight


def _is_copied(weight) -> bool:
    return weight.is_contiguous() and _is_whole(weight, weight.shape[1])


def _contiguous_if_whole(t) -> torch.Tensor:
    """A dense channels_last tensor as a contiguous one, if `contiguous` takes it."""
    return contiguous(t) if _is_laid_back(t) else t


def _is_laid_back(t) -> bool:
    return _is_whole(t, prod(t.shape[2:])) and t.movedim(1, -1).is_contiguous()


def _is_whole(t, count: int) -> bool:
    """Whether so many elements are whole pieces of 16 bytes, as `arrange` writes them, with its 32-bit offsets."""
    return count % (16 // t.element_size()) == 0 and not is_large(t)
