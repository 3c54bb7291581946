"""Ternary weights."""

from __future__ import annotations

import torch
from rarefy.rules import KeepZeros
from rarefy.technique import TrainingRule
from torch import nn

from rarefy_quantization.grids import Units
from rarefy_quantization.low_bit.config import TernaryConfig
from rarefy_quantization.low_bit.projection import Projection
from rarefy_quantization.low_bit.technique import LowBitQuantizer
from rarefy_quantization.low_bit.thresholds import Thresholded, TrainedTernary


class Ternary(LowBitQuantizer[TernaryConfig]):
    """Gives each weight one of three values; weights that are exactly zero stay zero."""

    def projection(self, layer: nn.Module, weight: torch.Tensor) -> Projection:
        """Return the thresholds of the method."""
        if self.config.method == "ttq":
            return TrainedTernary(weight, self.config.share)
        units = Units.of(weight.shape, self.config.granularity, weight.numel())
        return Thresholded(units, self.config.threshold == "exact")

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what keeps zeros zero."""
        return KeepZeros(model)

    def action(self) -> str:
        """Return what is done to a layer, in words."""
        if self.config.method == "ttq":
            return f"ternary, ttq, two learned values, threshold {self.config.share:g} of the largest"
        return f"ternary, twn, {self.config.threshold} threshold, a scale per {self.config.granularity}"
