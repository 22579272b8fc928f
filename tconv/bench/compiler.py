"""Compile the kernels that cases launch, and launch nothing: a stand-in takes the place of Triton's driver, tensors are the host's
and hold nothing, and of what dispatch leaves to aten nothing is computed.

So many processes share one device, of which they take neither time nor memory, and each begins within seconds.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import aten, launch, layouts, probe, shift
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


def launching_nothing(driver: Any = None) -> type:
    """A class whose instances, of compiled kernels, launch nothing.  driver: the real one, whose launchers compile code for the host
    under Triton 3.6, so that each is made; later ones have one way to launch (`utils.launch`) for all kernels."""
    real = None if driver is None or hasattr(driver.utils, "launch") else driver.launcher_cls

    class Launcher:
        def __init__(self, source, metadata):
            if real:
                real(source, metadata)

        def __call__(self, *args) -> None:
            pass

    return Launcher


class Driver:
    """What Triton asks of a driver to compile and launch, of one device."""

    def __init__(self, target: Any, properties: dict, launcher: type | None = None):
        """target: a GPUTarget of Triton's; properties: what its own driver says of the device."""
        self.target, self.utils, self.launcher_cls = target, Utils(properties), launcher or launching_nothing()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def stand_in(target: Target, driver: Driver) -> None:
    """From now on, in this process, tconv's launches on host tensors are planned for a target, compiled for the driver's, and go
    nowhere.  The probe, which precedes the first Hopper kernel on a device, is compiled at once."""
    from triton.runtime import driver as tritons

    tritons.set_active(driver)
    launch.target_of = lambda device: target
    for name, function in UNCOMPUTED.items():
        setattr(aten, name, function)
    if not shift.unavailable(target):
        for tile in probe.TILES.values():
            probe.compile(tile, *probe.sample(tile, torch.device("cpu")))


# What aten makes, uninitialised: of channels_last activations in channels_last, whose way back is a launch of tconv's.


def _forward(input, weight, bias, geometry) -> torch.Tensor:
    return layouts.empty_output(input, weight, geometry.output_size(input.shape[2:]), weight.shape[1] * geometry.groups)


def _input(grad_output, weight, like, geometry) -> torch.Tensor:
    return like.squeeze(2) if geometry.ndim == 1 and like.ndim == 4 else like


def _weight(grad_output, input, like, geometry, parts=1) -> torch.Tensor:
    like = _input(grad_output, input, like, geometry)
    if layouts.suggested(input) == torch.contiguous_format:
        return like
    return like.new_empty(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


def _both(grad_output, input, weight, geometry) -> list[torch.Tensor]:
    made = _input(grad_output, weight, torch.empty_like(input), geometry)
    return [made, _weight(grad_output, input, torch.empty_like(weight), geometry)]


def _bias(grad_output) -> torch.Tensor:
    return grad_output.new_empty(grad_output.shape[1])


UNCOMPUTED = dict(
    forward=_forward, backward_input=_input, backward_weight=_weight, gradients=_both, backward_bias=_bias
)


def compile_layer(layer: Layer, passes: list[str], precision: str, memory_format: str) -> None:
    """Compile what the passes of a layer launch; after `stand_in`."""
    g, dtype = layer.geometry, check.dtype_of(precision)
    last = memory_format == "channels_last"
    input, weight, grad = (
        _empty(size, dtype, last) for size in (layer.input_shape, layer.weight_shape, layer.output_shape)
    )
    bias = torch.empty(layer.out_channels, dtype=dtype) if layer.bias else None
    check.set_precision(precision)
    if {"forward", "training"} & set(passes):
        launch.forward(input, weight, bias, g)
    if "backward_input" in passes:
        launch.backward_input(grad, weight, input.shape[2:], g)
    if "backward_weight" in passes:
        launch.backward_weight(grad, input, g)
    if "training" in passes:
        launch.gradients(grad, input, weight, g, (True, True))
        if bias is not None:
            launch.backward_bias(grad)


def _empty(size, dtype, last: bool) -> torch.Tensor:
    """As `contiguous` would leave it: what is in a format already stays as it is."""
    plain = torch.empty(size, dtype=dtype)
    form = LAST.get(plain.ndim) if last else None
    return (
        plain
        if form is None or plain.is_contiguous(memory_format=form)
        else torch.empty(size, dtype=dtype, memory_format=form)
    )
