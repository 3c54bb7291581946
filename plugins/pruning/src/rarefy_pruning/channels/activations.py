"""Criteria by what the layers that read a unit see of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rarefy.calibration import stream_inputs
from rarefy.dependencies import Member
from rarefy.task import Task
from torch import nn

from rarefy_pruning.channels.config import ChannelActivationConfig
from rarefy_pruning.channels.criterion import ChannelCriterion
from rarefy_pruning.channels.units import Units

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Moments:
    """Sums over samples and positions, one entry per input channel."""

    count: int
    total: torch.Tensor
    magnitude: torch.Tensor
    square: torch.Tensor
    nonzero: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, axis: int) -> _Moments:
        """Sum over all axes of `x` but one."""
        flat = x.detach().float().movedim(axis, 0).flatten(1)
        return cls(flat.shape[1], flat.sum(1), flat.abs().sum(1), flat.square().sum(1), (flat != 0).float().sum(1))

    def plus(self, other: _Moments) -> _Moments:
        """Return the sums over both."""
        return _Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def statistic(self, kind: str) -> torch.Tensor:
        """Return the statistic of each channel."""
        if kind == "mean":
            return self.magnitude / self.count
        if kind == "nonzero":
            return self.nonzero / self.count
        mean = self.total / self.count
        return (self.square / self.count - mean.square()).clamp_min(0).sqrt()


class Activation(ChannelCriterion[ChannelActivationConfig]):
    """A statistic of the unit as its readers see it, so after normalization and non-linearity."""

    def measure(self, model: nn.Module, units: Sequence[Units], task: Task) -> None:
        """Run a few batches and watch the inputs of the layers that read the units."""
        self.moments: dict[str, _Moments] = {}

        def visit(name: str, axis: int) -> None:
            def add(x: torch.Tensor) -> None:
                now = _Moments.of(x, axis)
                self.moments[name] = self.moments[name].plus(now) if name in self.moments else now

            visits[name] = add

        visits: dict = {}
        for u in units:
            for member in _watched(u):
                layer = u.owners[member.tensor]
                visit(_layer(member), -1 if isinstance(layer, nn.Linear) else -(layer.weight.dim() - 1))
        batches = self.config.batches
        if visits:
            stream_inputs(model, task.calibration(batches=batches), visits, "measuring activations", batches)

    def score(self, units: Units) -> torch.Tensor | str:
        """Return the largest statistic of a unit over its readers."""
        found = []
        for member in _watched(units):
            if (moments := self.moments.get(_layer(member))) is not None:
                statistic = moments.statistic(self.config.statistic)
                found.append(statistic[member.indices.to(statistic.device)].mean(1))
        if not found:
            return "no linear layer or ungrouped convolution reads its units"
        return torch.stack(found).amax(0)


def _watched(units: Units) -> list[Member]:
    layers = [(member, units.owners[member.tensor]) for member in units.readers]
    return [m for m, layer in layers if isinstance(layer, _LAYERS) and getattr(layer, "groups", 1) == 1]


def _layer(member: Member) -> str:
    return member.tensor.rpartition(".")[0]
