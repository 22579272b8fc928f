"""The real layers that tconv is tested and measured on, shipped as data.

kernelbench: every transposed convolution of KernelBench (ScalingIntelligence/KernelBench), at its published
size.  zoo: the layers of public models, each entry naming its source file and commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import prod

from .geometry import Geometry

SUITES = ("kernelbench", "zoo")


@dataclass(frozen=True)
class Layer:
    """One layer at one size; `source` says where it comes from."""

    name: str
    source: str
    geometry: Geometry
    in_channels: int
    out_channels: int
    bias: bool
    input_shape: tuple[int, ...]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.input_shape[0], self.out_channels, *self.geometry.output_size(self.input_shape[2:]))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.geometry.groups, *self.geometry.kernel)

    @property
    def elements(self) -> int:
        """Elements of input and output together."""
        return prod(self.input_shape) + prod(self.output_shape)

    @property
    def options(self) -> dict:
        """The keyword arguments of conv_transposeNd."""
        g = self.geometry
        return dict(
            stride=g.stride, padding=g.padding, output_padding=g.output_padding, groups=g.groups, dilation=g.dilation
        )

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        return f"{self.name}: {shape} to {self.out_channels}, {self.geometry.describe()}"


def _layer(name: str, source: str, entry: dict) -> Layer:
    kernel, stride, padding, output_padding, dilation = (
        tuple(entry[key]) for key in ("kernel", "stride", "padding", "output_padding", "dilation")
    )
    geometry = Geometry(kernel, stride, padding, output_padding, entry["groups"], dilation)
    return Layer(
        name,
        source,
        geometry,
        entry["in_channels"],
        entry["out_channels"],
        entry["bias"],
        tuple(entry["input_shape"]),
    )


@cache
def layers(suite: str) -> tuple[Layer, ...]:
    """The layers of a suite ("kernelbench" or "zoo"), in the order of its file."""
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}, expected one of {', '.join(SUITES)}")
    data = json.loads((resources.files("tconv") / "data" / f"{suite}.json").read_text())
    if suite == "zoo":
        return tuple(_layer(e["name"], e["source"], e) for e in data)
    found = []
    for problem in data["problems"]:
        for i, entry in enumerate(problem["convs"]):
            name = problem["name"] + (f".{i}" if len(problem["convs"]) > 1 else "")
            found.append(_layer(name, f"{data['source'].split(' (')[0]}: {problem['title']}", entry))
    return tuple(found)
