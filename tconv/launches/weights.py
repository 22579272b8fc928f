"""Weights as kernels take them: packed, rounded to TF32, with folded phases."""

from __future__ import annotations

import torch

from .. import shift
from ..configs import PARTS, cdiv, power_of_two
from ..geometry import Geometry, sizes3
from ..layouts import order_of, strides5
from ..record import Record

UNFOLDED = (0,) * 11  # what kernels.pack asks about folded phases


def pack(
    noted: Record, weight, roles, taps, groups, c_src, c_dst, block_n, block_k, parts: int,
    entries: int = 0, phases: int = 1, folded: tuple[int, ...] = UNFOLDED, early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The weight as [group and tap, destination channel, source channel], zero-padded to whole blocks; fp32 as so many
    TF32 values, one whole packed weight after the other (0: as it is).

    roles: the weight's strides along group, source channel and destination channel; taps: along the kernel's axes.
    entries, phases, folded: of folded phases (pack_folded), how many offsets along the width there are in place of taps.
    early: whether the next launch may begin before this one ends.
    """
    from ..kernels.pack import pack_weight

    (kd, kh, kw), channels = sizes3(weight.shape[2:]), cdiv(c_dst, block_n // phases) * (block_n // phases)
    blocks, count = groups * kd * kh * (entries or kw), kd * kh * kw
    width, height = cdiv(c_src, block_k) * block_k, channels * phases
    packed = noted.workspace((max(1, parts) * blocks, height, width), weight.dtype, weight)
    order = order_of(roles[2], taps, c_dst, weight.shape[2:])
    # A run of addresses is one tap's channels, or all taps of all channels.
    runs, of_a_run = (count, 1) if order == "channels" else (1, count)
    block_r, block_c = power_of_two(channels * of_a_run, 16, 64), power_of_two(width, 16, 64)
    noted.launch(
        pack_weight, runs * cdiv(channels * of_a_run, block_r) * cdiv(width, block_c) * groups,
        weight, packed, c_src, c_dst, count, kh, kw, *roles, *taps, width, channels, blocks * height, *folded,
        PHASES=phases,
        PARTS=parts,
        ORDER=order,
        ALIGNED=all(n % 16 == 0 for n in (roles[0], roles[1], c_dst * of_a_run)),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        EARLY=early,
    )  # fmt: skip
    return packed


def pack_folded(noted: Record, weight, geometry: Geometry, tile: shift.Shift) -> torch.Tensor:
    """The weight as a shift tile with folded phases takes it: [taps and offsets, rows of M, input channel]."""
    (c_in, c_out), (w_i, w_o, *taps), fold = weight.shape[:2], strides5(weight), tile.fold
    axis, entries = geometry.axes3[2], sum(fold.count)
    places = [(first, sum(fold.count[:g]) - low) for g, (first, low) in enumerate(zip(fold.first, fold.low))]
    places += [(axis.stride, 0)] * (shift.MOST_ACCUMULATORS - len(places))  # no phase is that far
    return pack(
        noted, weight, (0, w_i, w_o), taps, 1, c_in, c_out, shift.M, tile.kb, PARTS.get(tile.dtype, 0),
        entries, fold.phases,
        (axis.stride, axis.padding, axis.dilation, entries, *[value for place in places for value in place][1:]), early=True,
    )  # fmt: skip
