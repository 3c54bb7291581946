"""Pruning by weights and activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rarefy.task import Task
from rarefy.weights import LayerWeight
from torch import nn

from rarefy_pruning.measures import input_norms
from rarefy_pruning.weights.config import WandaConfig
from rarefy_pruning.weights.criterion import WeightCriterion


class Wanda(WeightCriterion[WandaConfig]):
    """Magnitude times the norm of the input (Sun et al. 2024, eq. 1).

    For a convolution, the input of a weight is what its place of the kernel sees at all positions.
    """

    def measure(self, model: nn.Module, weights: Sequence[LayerWeight], task: Task) -> dict[str, torch.Tensor]:
        """Return the norms of the inputs."""
        return input_norms(model, weights, task, self.config.batches)

    def score(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Return |w| ||x||."""
        return weight.abs() * norm
