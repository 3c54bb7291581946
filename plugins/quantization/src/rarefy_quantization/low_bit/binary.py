"""Binary weights."""

from __future__ import annotations

import torch
from rarefy.technique import TrainingRule
from torch import nn

from rarefy_quantization.grids import Units
from rarefy_quantization.low_bit.config import BinaryConfig
from rarefy_quantization.low_bit.projection import LatentRule, Projection
from rarefy_quantization.low_bit.signs import ConnectedSigns, LossAwareSigns, ScaledSigns, glorot
from rarefy_quantization.low_bit.technique import LowBitQuantizer


class Binary(LowBitQuantizer[BinaryConfig]):
    """Gives each weight one of two values, -a and a."""

    def projection(self, layer: nn.Module, weight: torch.Tensor) -> Projection:
        """Return the signs of the method."""
        if self.config.method == "binary-connect":
            limit = 1.0 if self.config.scale == "one" else glorot(layer, weight.shape)
            return ConnectedSigns(limit, self.config.stochastic)
        units = Units.of(weight.shape, self.config.granularity, weight.numel())
        if self.config.method == "loss-aware":
            return LossAwareSigns(units, weight)
        return ScaledSigns(units, self.config.gradient == "scaled")

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what clips the weights and follows the gradients."""
        return LatentRule()

    def action(self) -> str:
        """Return what is done to a layer, in words."""
        if self.config.method == "binary-connect":
            return f"binary, {self.config.method}, the scale {self.config.scale}"
        return f"binary, {self.config.method}, a scale per {self.config.granularity}"
