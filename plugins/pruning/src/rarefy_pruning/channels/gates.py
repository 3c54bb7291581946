"""Criteria by the gradient in a gate on each unit.

A gate that scales a unit by g scales the weights that read it, so dL/dg = sum w dL/dw over them at g = 1, exactly;
removing the unit is g = 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import torch
from rarefy.gradients import differentiable, loss_of
from rarefy.measure.mode import device_of
from rarefy.task import Task
from torch import nn

from rarefy_pruning.channels.config import ChannelFisherConfig, ChannelTaylorConfig, SampledChannelPruning
from rarefy_pruning.channels.criterion import ChannelCriterion
from rarefy_pruning.channels.units import Units

ConfigT = TypeVar("ConfigT", bound=SampledChannelPruning)


class GateCriterion(ChannelCriterion[ConfigT]):
    """The mean over samples n of a function of dL_n/dg; write `of`.

    Samples are taken one by one: over a whole batch gradients of opposite signs cancel, and where training has ended
    nothing but noise is left of their mean.
    """

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return what counts of the gradients of one sample's loss, `(units,)`."""
        raise NotImplementedError

    def measure(self, model: nn.Module, units: Sequence[Units], task: Task) -> None:
        """Take the gradients of each sample's loss in the gates."""
        self.sums = {u.group.name: torch.zeros(u.size, device=device_of(model)) for u in units}
        self.samples = 0
        with differentiable(model, list(model.parameters())):
            for batch in itertools.islice(task.loader("train", 1, shuffle=True, seed=0), self.config.samples):
                self.samples += 1
                for name, gradient in gate_gradients(loss_of(model, task, batch), units).items():
                    self.sums[name] += self.of(gradient)

    def score(self, units: Units) -> torch.Tensor:
        """Return the mean over the samples."""
        return self.sums[units.group.name] / max(self.samples, 1)


class Taylor(GateCriterion[ChannelTaylorConfig]):
    """E|dL_n/dg|, the change of a sample's loss to first order (Molchanov et al. 2017, section 2.2, on a gate)."""

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return |dL_n/dg|."""
        return gradient.abs()


class Fisher(GateCriterion[ChannelFisherConfig]):
    """E[(dL_n/dg)^2] / 2, the change of the loss to second order (Theis et al. 2018, eq. 8)."""

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return (dL_n/dg)^2 / 2."""
        return gradient.square() / 2


def gate_gradients(loss: torch.Tensor, units: Sequence[Units]) -> dict[str, torch.Tensor]:
    """Return dL/dg of each unit by group, `(units,)`; where nothing reads it, that of a gate on what makes it."""
    chosen = {u.group.name: u.readers or u.makers for u in units}
    names = sorted({member.tensor for members in chosen.values() for member in members})
    weights = [units[0].tensors[name] for name in names]
    gradients = dict(zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True))
    found = {}
    for u in units:
        parts = [
            (u.slices(m) * u.slices(m, gradient)).sum(1)
            for m in chosen[u.group.name]
            if (gradient := gradients[m.tensor]) is not None
        ]
        if parts:
            found[u.group.name] = torch.stack(parts).sum(0)
    return found
