"""Dropout that goes with the number of connections left: D_r = D_o sqrt(C_ir / C_io) (Han et al. 2015, eq. 3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rarefy.measure.mode import device_of, evaluation, move
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Dropouts:
    """The dropout modules of a model that come behind pruned layers, with their rates before anything is pruned.

    A rate that was adjusted stays with the model, so that later fine-tuning, and another pruning, start from it.
    Dropout that is called as a function is not found.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], layers: Sequence[str]) -> None:
        """Run the model once on `inputs`: a dropout module belongs to the layer with weights that ran last before it.

        One that is used behind several layers belongs to all of them; it is left alone unless all are among `layers`.
        """
        behind = _run_order(model, inputs)
        self.layers = {name: before for name, before in behind.items() if before and before <= set(layers)}
        self.rates = {name: model.get_submodule(name).p for name in self.layers}
        self.connections = {name: _alive(model, before) for name, before in self.layers.items()}

    def adjust_(self, model: nn.Module) -> None:
        """Set the rates in place that go with the weights that are not zero now."""
        for name, before in self.layers.items():
            left = _alive(model, before) / self.connections[name]
            model.get_submodule(name).p = self.rates[name] * math.sqrt(left)

    def notes(self, model: nn.Module) -> list[str]:
        """Return a sentence for each rate that has changed."""
        now = {name: model.get_submodule(name).p for name in self.layers}
        return [
            f"Dropout {name!r} went from {rate:.3f} to {now[name]:.3f}, by the connections left before it."
            for name, rate in self.rates.items()
            if now[name] != rate
        ]


def _alive(model: nn.Module, layers: set[str]) -> int:
    return sum(int(model.get_parameter(f"{name}.weight").count_nonzero()) for name in layers)


def _run_order(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, set[str]]:
    """Return for each dropout module that runs the names of the layers with weights that ran last before it."""
    behind: dict[str, set[str]] = {}
    last: list[str] = []

    def hook(name: str, dropout: bool) -> Callable[..., None]:
        def before(*_: Any) -> None:
            if dropout:
                behind.setdefault(name, set()).update(last[-1:])
            else:
                last.append(name)

        return before

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            dropout = isinstance(module, _DROPOUT)
            if dropout or (isinstance(weight, torch.Tensor) and weight.dim() > 1):
                stack.callback(module.register_forward_pre_hook(hook(name, dropout)).remove)
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.no_grad())
        model(*move(inputs, device_of(model)))
    return behind
