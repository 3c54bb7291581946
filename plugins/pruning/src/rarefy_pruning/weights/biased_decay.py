"""Pruning after a decay that spares large weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rarefy_pruning.weights.config import BiasedWeightDecayConfig
from rarefy_pruning.weights.criterion import WeightCriterion


def hyperbolic(weight: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Return |w| / (1 + lambda |w|): its slope is 1 at zero and (1 + lambda |w|)^-2 beside it."""
    return weight.abs() / (1 + sharpness * weight.abs())


def exponential(weight: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Return 1 - exp(-lambda |w|): its slope is lambda at zero and lambda exp(-lambda |w|) beside it."""
    return -torch.expm1(-sharpness * weight.abs())


_FORMS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "hyperbolic": hyperbolic,
    "exponential": exponential,
}


class BiasedWeightDecay(WeightCriterion[BiasedWeightDecayConfig]):
    """Magnitude, after training with a penalty that is bounded per weight (Hanson & Pratt 1989)."""

    def penalty(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of the penalties times `strength`."""
        form = _FORMS[self.config.form]
        return self.config.strength * sum(form(weight, self.config.sharpness).sum() for weight in weights)

    def score(self, weight: torch.Tensor) -> torch.Tensor:
        """Return |w|."""
        return weight.abs()
