"""Tensors that training computes from others, on every layer that holds them, and back to plain parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


def places(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return the layers that hold a parameter, each with its name there."""
    return [
        (module, name)
        for module in list(model.modules())
        for name, own in module.named_parameters(recurse=False)
        if own is parameter
    ]


def computed(layer: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """Return the parametrizations of a layer by a module of class `kind`, by tensor name."""
    found: Any = getattr(layer, "parametrizations", {})
    return {name: steps for name, steps in found.items() if isinstance(steps[0], kind)}


def make_plain_(model: nn.Module, kind: type[nn.Module]) -> None:
    """Turn what is computed by `kind` into plain parameters of the values it has; what shared one shares one again."""
    plain: dict[nn.Parameter, nn.Parameter] = {}
    for layer in list(model.modules()):
        for name, steps in computed(layer, kind).items():
            original = steps.original
            if original not in plain:
                plain[original] = nn.Parameter(getattr(layer, name).detach(), requires_grad=original.requires_grad)
            parametrize.remove_parametrizations(layer, name, leave_parametrized=False)
            setattr(layer, name, plain[original])


def with_gradient(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return `value`, bit for bit, with the gradient of `source` added to its own."""
    return value + (source - source.detach())
