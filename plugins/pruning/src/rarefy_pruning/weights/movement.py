"""Pruning by what fine-tuning does to the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rarefy.gradients import add_
from rarefy.task import Task
from rarefy.weights import LayerWeight
from torch import nn

from rarefy_pruning.weights.config import MovementConfig
from rarefy_pruning.weights.criterion import WeightCriterion


class Movement(WeightCriterion[MovementConfig]):
    """Movement away from zero, summed over the steps so far (Sanh et al. 2020, eq. 4 to 6).

    In the paper a weight comes back when its score recovers; here a removed one stays removed, so the sum of a weight
    ends where it is pruned.
    """

    def __init__(self, config: MovementConfig) -> None:
        super().__init__(config)
        self.moved: dict[str, torch.Tensor] = {}

    def observe(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add -w dL/dw; a step whose gradients overflow does not count, as the optimizer leaves it out as well."""
        if torch.isfinite(gradient).all():
            add_(self.moved, name, -weight.float() * gradient.float())

    def measure(self, model: nn.Module, weights: Sequence[LayerWeight], task: Task) -> dict[str, torch.Tensor]:
        """Return the sums, none before the first step."""
        return self.moved

    def score(self, weight: torch.Tensor, *moved: torch.Tensor) -> torch.Tensor:
        """Return the sum of -w dL/dw; before the first step magnitude stands in for it."""
        return moved[0] if moved else weight.abs()
