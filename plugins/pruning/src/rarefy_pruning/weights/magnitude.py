"""Pruning by magnitude."""

from __future__ import annotations

import torch

from rarefy_pruning.weights.config import MagnitudeConfig
from rarefy_pruning.weights.criterion import WeightCriterion


class Magnitude(WeightCriterion[MagnitudeConfig]):
    """Absolute value of the weight (Han et al. 2015)."""

    def score(self, weight: torch.Tensor) -> torch.Tensor:
        """Return |w|."""
        return weight.abs()
