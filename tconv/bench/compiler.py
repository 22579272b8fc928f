"""Compile the kernels that cases launch, and launch nothing: a stand-in takes the place of Triton's driver, tensors are the host's
and hold nothing, and of what dispatch leaves to aten nothing is computed.

So many processes share one device, of which they take neither time nor memory, and each begins within seconds.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import aten, launch, layouts
from ..configs import Target
from ..workloads import Layer
from . import check
from .providers import LAST


class Utils:
    """Of a driver: the device's properties, and no kernel is loaded."""

    def __init__(self, properties: dict):
        self.properties = properties

    def get_device_properties(self, device) -> dict:
        return self.properties

    def load_binary(self, name, kernel, shared, device) -> tuple:
        return 1, name, 128, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module) -> None:
        pass


class Launcher:
    """Of a compiled kernel: launches nothing."""

    def __init__(self, source, metadata):
        pass

    def __call__(self, *args) -> None:
        pass


class Driver:
    """What Triton asks of a driver to compile and launch, of one device."""

    def __init__(self, target: Any, properties: dict, launcher: type = Launcher):
        """target: a GPUTarget of Triton's; properties: what its own driver says of the device."""
        self.target, self.utils, self.launcher_cls = target, Utils(properties), launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def stand_in(target: Target, driver: Driver) -> None:
    """From now on, in this process, tconv's launches on host tensors are planned for a target, compiled for the driver's, and go
    nowhere."""
    from triton.runtime import driver as tritons

    tritons.set_active(driver)
    launch.target_of = lambda device: target
    nothing = dict(forward=_forward, backward_input=_like, backward_weight=_like, gradients=_both)
    for name, function in nothing.items():
        setattr(aten, name, function)


def _forward(input, weight, bias, geometry) -> torch.Tensor:
    return layouts.empty_output(input, weight, geometry.output_size(input.shape[2:]), weight.shape[1] * geometry.groups)


def _like(first, second, like, geometry, parts=1) -> torch.Tensor:
    return like.squeeze(2) if geometry.ndim == 1 and like.ndim == 4 else like


def _both(grad_output, input, weight, geometry) -> list[torch.Tensor]:
    return [_like(grad_output, t, torch.empty_like(t), geometry) for t in (input, weight)]


def compile_layer(layer: Layer, passes: list[str], precision: str, memory_format: str) -> None:
    """Compile what the passes of a layer launch; after `stand_in`."""
    g, dtype = layer.geometry, check.dtype_of(precision)
    ndim = g.ndim + 2
    form = LAST[ndim] if memory_format == "channels_last" and ndim in LAST else torch.contiguous_format
    input, weight, grad = (
        torch.empty(size, dtype=dtype, memory_format=form)
        for size in (layer.input_shape, layer.weight_shape, layer.output_shape)
    )
    bias = torch.empty(layer.out_channels, dtype=dtype) if layer.bias else None
    check.set_precision(precision)
    if {"forward", "training"} & set(passes):
        launch.forward(input, weight, bias, g)
    if {"backward_input", "training"} & set(passes):
        launch.backward_input(grad, weight, input.shape[2:], g)
    if {"backward_weight", "training"} & set(passes):
        launch.backward_weight(grad, input, g)
    if "training" in passes and bias is not None:
        launch.backward_bias(grad)
