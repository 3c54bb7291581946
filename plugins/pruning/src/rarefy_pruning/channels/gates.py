"""Criteria by the gradient in a gate on each unit.

A gate that scales a unit by g scales the weights that read it, so dL/dg = sum w dL/dw over them at g = 1, exactly;
removing the unit is g = 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from rarefy.gradients import differentiable, labelled, loss_of
from rarefy.measure.mode import device_of
from rarefy.task import Task
from torch import nn

from rarefy_pruning.channels.config import ChannelFisherConfig, ChannelTaylorConfig
from rarefy_pruning.channels.criterion import ChannelCriterion
from rarefy_pruning.channels.units import Units


class Taylor(ChannelCriterion[ChannelTaylorConfig]):
    """|dL/dg|, the change of the mean loss to first order (Molchanov et al. 2017, eq. 6, on the group's gate)."""

    def measure(self, model: nn.Module, units: Sequence[Units], task: Task) -> None:
        """Take the gradients of the loss in the gates."""
        self.gradients = {u.group.name: torch.zeros(u.size, device=device_of(model)) for u in units}
        with differentiable(model, list(model.parameters())):
            for share, batch in labelled(task, self.config.batches):
                for name, gradient in gate_gradients(loss_of(model, task, batch), units).items():
                    self.gradients[name] += share * gradient

    def score(self, units: Units) -> torch.Tensor:
        """Return |dL/dg|."""
        return self.gradients[units.group.name].abs()


class Fisher(ChannelCriterion[ChannelFisherConfig]):
    """E[(dL_n/dg)^2] / 2 over samples n, the change to second order (Theis et al. 2018, eq. 8)."""

    def measure(self, model: nn.Module, units: Sequence[Units], task: Task) -> None:
        """Take the gradients of each sample's loss in the gates."""
        self.squares = {u.group.name: torch.zeros(u.size, device=device_of(model)) for u in units}
        samples = 0
        with differentiable(model, list(model.parameters())):
            loader = task.loader("train", 1, shuffle=True, seed=0)
            for batch in itertools.islice(loader, self.config.samples):
                samples += 1
                for name, gradient in gate_gradients(loss_of(model, task, batch), units).items():
                    self.squares[name] += gradient.square()
        for square in self.squares.values():
            square /= 2 * max(samples, 1)

    def score(self, units: Units) -> torch.Tensor:
        """Return E[(dL/dg)^2] / 2."""
        return self.squares[units.group.name]


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
