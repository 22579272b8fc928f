"""Phases, taps and sizes against brute force, in plain integers."""

import itertools

import pytest
import torch

from tconv.configs import Target, is_valid
from tconv.dispatch import plan
from tconv.functional import as_tuple
from tconv.geometry import Axis
from tconv.problem import PASSES, Problem
from tconv.workloads import SUITES, layers

AXES = [
    Axis(k, s, p, d)
    for k, s, p, d in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 3, 4, 6), (0, 1, 2, 5), (1, 2, 3, 4))
]


def test_taps_against_brute_force():
    """Every (input, tap) product lands where the definition o = i*s - p + d*k puts it, once and nowhere else."""
    size, output_padding = 6, 0
    for axis in AXES:
        length = axis.output_size(size, output_padding)
        defined = sorted(
            (i * axis.stride - axis.padding + axis.dilation * k, k, i)
            for i in range(size)
            for k in range(axis.kernel)
            if 0 <= i * axis.stride - axis.padding + axis.dilation * k < length
        )
        gathered = sorted(
            (o, k, o // axis.stride + offset)
            for o in range(length)
            for k, offset in axis.taps(o % axis.stride)
            if 0 <= o // axis.stride + offset < size
        )
        assert gathered == defined, axis


def test_phases_share_the_taps_out():
    """Each tap belongs to the phases of its residue class: s / gcd phases hold taps when gcd(s, d) > 1."""
    for axis in AXES:
        taps = [k for phase in range(axis.stride) for k, _ in axis.taps(phase)]
        assert sorted(taps) == list(range(axis.kernel)), axis
    unreached = Axis(3, 4, 0, 2)
    assert [len(unreached.taps(a)) for a in range(4)] == [2, 0, 1, 0]


@pytest.mark.parametrize("suite", SUITES)
def test_output_sizes_of_the_suites(suite):
    import json
    from importlib import resources

    data = json.loads((resources.files("tconv") / "data" / f"{suite}.json").read_text())
    entries = [c for p in data["problems"] for c in p["convs"]] if suite == "kernelbench" else data
    assert len(entries) == len(layers(suite)) == {"kernelbench": 51, "zoo": 267}[suite]
    for layer, entry in zip(layers(suite), entries, strict=True):
        if "output_shape" in entry:
            assert list(layer.output_shape) == entry["output_shape"], layer


def test_as_tuple():
    assert as_tuple(2, "stride", 3) == (2, 2, 2)
    assert as_tuple([3], "stride", 2) == (3, 3)
    assert as_tuple((1, 2), "stride", 2) == (1, 2)
    with pytest.raises(RuntimeError, match="stride"):
        as_tuple((1, 2, 3), "stride", 2)
    with pytest.raises(TypeError, match="padding"):
        as_tuple(1.5, "padding", 2)


@pytest.mark.parametrize("suite", SUITES)
def test_every_configuration_is_valid(suite):
    """The heuristics' choices for every layer, pass, precision and format, by the predicate that tuning would use."""
    targets = (Target("cuda", 80, 108), Target("cuda", 90, 132), Target("cuda", 100, 148), Target("hip", 942, 304))
    seen = set()
    for layer, direction, target, (dtype, tf32), last in itertools.product(
        layers(suite),
        PASSES,
        targets,
        ((torch.float32, True), (torch.float32, False), (torch.float16, True)),
        (False, True),
    ):
        g, shape = layer.geometry, layer.input_shape
        problem = Problem(
            direction, g, shape[0], shape[1], layer.out_channels, shape[2:], dtype, tf32, "vectors" if last else "width"
        )
        chosen = plan(problem, target)
        seen.add(chosen.family)
        if chosen.family == "gemm":
            pixels = chosen.config.block_k if direction == "backward_weight" else chosen.config.block_m
            assert is_valid(chosen.config, pixels, dtype.itemsize), (layer, direction, target, chosen)
    assert "gemm" in seen
