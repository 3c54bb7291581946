"""Criteria that look at the weights alone."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _NormBase

from rarefy_pruning.channels.config import (
    ChannelBatchNormConfig,
    ChannelGeometricMedianConfig,
    ChannelL1Config,
    ChannelL2Config,
    ChannelRandomConfig,
)
from rarefy_pruning.channels.criterion import ChannelCriterion
from rarefy_pruning.channels.units import Units


class L1(ChannelCriterion[ChannelL1Config]):
    """Mean magnitude of a unit's filters (Li et al. 2017, section 3.1); the sum, but for the filters' size."""

    def score(self, units: Units) -> torch.Tensor:
        """Return mean |w|."""
        return units.filters().abs().mean(1)


class L2(ChannelCriterion[ChannelL2Config]):
    """Root mean square of a unit's filters (He et al. 2018, eq. 2 with p = 2, but for the filters' size)."""

    def score(self, units: Units) -> torch.Tensor:
        """Return the root mean square of w."""
        return units.filters().square().mean(1).sqrt()


class GeometricMedian(ChannelCriterion[ChannelGeometricMedianConfig]):
    """Sum of the distances to the other units' filters (He et al. 2019, eq. 4)."""

    def score(self, units: Units) -> torch.Tensor:
        """Return sum_j ||w_i - w_j||."""
        filters = units.filters()
        return torch.cdist(filters, filters).sum(1)


class BatchNormScale(ChannelCriterion[ChannelBatchNormConfig]):
    """Mean |scale| of a unit in the batch normalizations it passes (Liu et al. 2017)."""

    def score(self, units: Units) -> torch.Tensor | str:
        """Return mean |gamma|."""
        scales = [
            units.slices(m)
            for m in units.group.members
            if isinstance(units.owners[m.tensor], _NormBase) and m.tensor.rpartition(".")[2] == "weight"
        ]
        return torch.cat(scales, 1).abs().mean(1) if scales else "no batch normalization scales its units"


class Random(ChannelCriterion[ChannelRandomConfig]):
    """Random scores from the step's seed."""

    def score(self, units: Units) -> torch.Tensor:
        """Return a random order."""
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(units.size, generator=self.generator)
