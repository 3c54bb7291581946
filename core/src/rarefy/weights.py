"""The weights a step acts on, one entry per tensor, and options given per layer by name pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from rarefy_schemas import SkippedLayer, TechniqueConfig
from torch import nn

from rarefy.errors import StageError
from rarefy.technique import passed_over, refuse_not_finite, select

V = TypeVar("V")


@dataclass(frozen=True)
class LayerWeight:
    """The weight of one target layer."""

    name: str
    """Name of the layer."""
    layer: nn.Module
    parameter: nn.Parameter

    @property
    def kind(self) -> str:
        """Class name of the layer."""
        return type(self.layer).__name__


def layer_weights(model: nn.Module, config: TechniqueConfig) -> tuple[list[LayerWeight], list[SkippedLayer]]:
    """Return the weights of the target layers, each tensor once, and the layers that have none to work on.

    Raises `StageError` when no layer is a target or a weight is NaN or infinite.
    """
    weights: list[LayerWeight] = []
    owners: dict[nn.Parameter, str] = {}
    targets = dict(select(model, config))
    skipped = passed_over(model, config, targets)
    for name, layer in targets.items():
        parameter = dict(layer.named_parameters(recurse=False)).get("weight")
        if parameter is not None:
            refuse_not_finite(name, parameter)
        if parameter is None:
            reason = "its weight is computed from other tensors; make it a plain parameter first"
        elif parameter.numel() == 0:
            reason = "it has no weights"
        elif parameter in owners:
            reason = f"it shares its weight with {owners[parameter]!r} and changes with it"
        elif not parameter.any():
            reason = "all its weights are zero"
        else:
            owners[parameter] = name
            weights.append(LayerWeight(name, layer, parameter))
            continue
        skipped.append(SkippedLayer(name=name, kind=type(layer).__name__, reason=reason))
    return weights, skipped


def holders(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Return the names of the modules that hold a parameter."""
    return [name for name, m in model.named_modules() if any(p is parameter for p in m.parameters(recurse=False))]


def per_layer(names: Sequence[str], values: Mapping[str, V], default: V) -> dict[str, V]:
    """Return the value of each layer: that of the first pattern of `values` that matches its name, or `default`.

    Raises `StageError` for a pattern that decides about no layer.
    """
    first = {name: next((p for p in values if fnmatchcase(name, p)), None) for name in names}
    unused = [pattern for pattern in values if pattern not in first.values()]
    if unused:
        raise StageError(
            f"the patterns {', '.join(map(repr, unused))} of `per_layer` match no target layer that an earlier pattern "
            f"has not taken. The target layers are {', '.join(names)}; mend the pattern or leave it out"
        )
    return {name: default if pattern is None else values[pattern] for name, pattern in first.items()}
