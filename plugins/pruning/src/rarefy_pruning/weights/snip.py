"""Pruning by connection sensitivity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rarefy.gradients import gradients
from rarefy.task import Task
from rarefy.weights import LayerWeight
from torch import nn

from rarefy_pruning.weights.config import SnipConfig
from rarefy_pruning.weights.criterion import WeightCriterion


class Snip(WeightCriterion[SnipConfig]):
    """Change of the loss to first order when a connection is weakened (Lee et al. 2019, eq. 4).

    Over the sum of all, which the paper divides by, the order is the same.
    """

    def measure(self, model: nn.Module, weights: Sequence[LayerWeight], task: Task) -> dict[str, torch.Tensor]:
        """Return the gradients of the loss."""
        return gradients(model, weights, task, self.config.batches)

    def score(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return |w dL/dw|."""
        return (weight * gradient).abs()
