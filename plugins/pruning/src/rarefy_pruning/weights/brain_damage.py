"""Pruning by the diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rarefy.curvature import second_derivatives
from rarefy.task import Task
from rarefy.weights import LayerWeight
from torch import nn

from rarefy_pruning.weights.config import OptimalBrainDamageConfig
from rarefy_pruning.weights.criterion import WeightCriterion


class OptimalBrainDamage(WeightCriterion[OptimalBrainDamageConfig]):
    """Change of the loss to second order when a weight is removed at a minimum (LeCun et al. 1989, eq. 4)."""

    def measure(self, model: nn.Module, weights: Sequence[LayerWeight], task: Task) -> dict[str, torch.Tensor]:
        """Return the second derivatives of the loss."""
        return second_derivatives(model, weights, task, self.config.batches, self.config.probes, self.seed)

    def score(self, weight: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Return h w^2 / 2; a negative h, which no minimum has, counts as zero."""
        return curvature.clamp(min=0) * weight.square() / 2
