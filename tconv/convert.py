"""convert, revert and override: tconv under models that were not written for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from . import functional
from .modules import COUNTERPARTS

_BACK = {ours: torchs for torchs, ours in COUNTERPARTS.items()}


@dataclass
class Report:
    """What `convert` or `revert` did.

    changed: qualified names of the modules changed; left: names of transposed convolutions left as they
    were, with the reason.  A module registered under several names appears once.
    """

    action: str
    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        plural = "" if len(self.changed) == 1 else "s"
        lines = [f"{self.action} {len(self.changed)} transposed convolution{plural}"]
        lines += [f"  {name or '(the model itself)'}" for name in self.changed]
        if self.left:
            lines.append(f"left {len(self.left)}")
            lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Report:
    """Make every transposed convolution in `model` run on tconv, in place.

    Modules change class and nothing else: parameters, buffers, parametrizations (weight and spectral norm),
    hooks, ties, training flag, device and dtype stay; state_dict and optimizers are unaffected.  A lazy module
    converts when its first input gives it its size.  A subclass of torch's module is left, since its
    code is not ours to replace (`override` reaches the functional calls in it), and so are scripted and quantized
    modules; the report says so.  Converting twice changes nothing.

    Returns:
        A Report; the model itself is changed in place.
    """
    return _swap(model, "converted", COUNTERPARTS)


def revert(model: nn.Module) -> Report:
    """Undo `convert`: every tconv module in `model` becomes torch's own again, in place."""
    return _swap(model, "reverted", _BACK)


def _swap(model: nn.Module, action: str, mapping: dict[type[_ConvTransposeNd], type[_ConvTransposeNd]]) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    report = Report(action)
    for name, module in model.named_modules():
        kind = type(module)
        if kind in mapping:
            module.__class__ = mapping[kind]
            report.changed.append(name)
        elif parametrize.is_parametrized(module) and kind.__bases__[0] in mapping:
            # parametrize gave the instance a class of its own, with properties in place of the parameters.
            module.__class__ = _rebased(kind, mapping[kind.__bases__[0]])
            report.changed.append(name)
        elif action == "converted":
            reason = _why_left(module)
            if reason:
                report.left[name] = reason
    return report


def _rebased(kind: type, base: type) -> type:
    """The class `kind` with `base` in place of its one base (remove_parametrizations restores the base)."""
    members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(kind.__name__, (base,), members)


def _why_left(module: nn.Module) -> str | None:
    kind = type(module)
    base = kind.__bases__[0] if parametrize.is_parametrized(module) else kind
    if isinstance(module, tuple(_BACK)):
        return None
    if isinstance(module, _ConvTransposeNd):
        return f"{base.__module__}.{base.__qualname__} is a subclass of torch's module with code of its own"
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return "scripted by torch.jit" if original in {c.__name__ for c in COUNTERPARTS} else None
    if (
        "ConvTranspose" in kind.__name__ and next(module.children(), None) is None
    ):  # a quantized one, say; not a block of layers
        return f"{kind.__module__}.{kind.__qualname__} is not a torch.nn transposed convolution"
    return None


class override(TorchFunctionMode):
    """Context manager under which torch's transposed convolutions run on tconv, modules and functional calls alike.

    For code that cannot be converted: `with tconv.override(): model(x)`.  Nests, and holds for the thread
    that entered it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        ours = _OVERRIDES.get(func, func)
        return ours(*args, **(kwargs or {}))


_OVERRIDES = {
    torch.conv_transpose1d: functional.conv_transpose1d,
    torch.conv_transpose2d: functional.conv_transpose2d,
    torch.conv_transpose3d: functional.conv_transpose3d,
}
