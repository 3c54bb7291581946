"""What a removal leaves of a measure that can be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rarefy.dependencies import Dependencies, Removal, cut
from rarefy.measure import flops, parameters
from rarefy.measure.mode import move
from rarefy.modules.skeleton import meta_copy
from torch import nn

Left = Callable[[Removal], float]
"""The share of a measure that a removal leaves."""


def saving(left: Left, group: str, order: torch.Tensor) -> float:
    """Return the share of a measure that a unit of a group saves, the mean over the half that goes first, above 0.

    The FLOPs of a layer are a product of two widths, so that a unit saves less the more others are gone; what is
    compared between groups is the start.
    """
    half = order[: max(1, len(order) // 2)]
    return max(1 - left({group: half}), 1e-9) / len(half)


class CountedLeft:
    """The share of FLOPs, parameters or bytes that a removal leaves, counted on a copy without values."""

    def __init__(self, model: nn.Module, found: Dependencies, measure: str, inputs: tuple[Any, ...]) -> None:
        self.model, self.found = meta_copy(model), found
        self.inputs, self.measure = move(inputs, "meta"), measure
        self.whole = self._measure(self.model)
        self.known: dict[tuple[tuple[str, int], ...], float] = {}

    def __call__(self, removal: Removal) -> float:
        """Return the share, remembering widths seen before."""
        key = tuple((name, len(units)) for name, units in sorted(removal.items()))
        if key not in self.known:
            self.known[key] = self._measure(cut(self.model, self.found, removal)) / self.whole
        return self.known[key]

    def _measure(self, model: nn.Module) -> float:
        if self.measure == "flops":
            return flops(model, self.inputs)
        if self.measure == "parameters":
            return parameters(model)
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
