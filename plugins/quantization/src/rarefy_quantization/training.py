"""Weights that are rounded to a grid while they are trained, with the step sizes (LSQ, Esser et al. 2020)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from rarefy_quantization.grids import Grid, Units, round_step
from rarefy_quantization.parametrizations import places, with_gradient


class LearnedGrid(nn.Module):
    """Parametrization of a weight by rounding to a grid whose steps are learned; the range of codes stays.

    What the forward pass computes with is exactly what is left after training: steps of 16 significant bits times
    integers. The gradient of a weight passes straight through the rounding and ends where it is clipped; that of a step
    is eq. 3 of the paper times 1 / sqrt(n Q), section 2.2, with n weights per step and Q the largest code.

    A step is learned as a factor on the step it began with, whose gradient is scaled so that SGD moves the step as the
    paper's does; the updates of Adam, whose size is the learning rate, become shares of the step.
    """

    start: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, grid: Grid, units: Units) -> None:
        super().__init__()
        self.units = units
        self.factor = nn.Parameter(torch.ones_like(grid.step))
        self.register_buffer("start", grid.step)
        self.register_buffer("low", grid.low)
        self.register_buffer("high", grid.high)

    @property
    def step(self) -> torch.Tensor:
        """The steps, `(units, 1)`."""
        # one update too large must not turn the signs
        value = round_step(self.start * self.factor.detach().clamp(min=0.01))
        largest = self.high.maximum(-self.low)
        return with_gradient(value, self.factor * ((self.units.size * largest).rsqrt() / self.start))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight on the grid."""
        step = self.step
        clipped = (self.units.split(weight) / step).maximum(self.low).minimum(self.high)
        codes = with_gradient(clipped.detach().round(), clipped)
        return self.units.join(codes * step).to(weight.dtype)


def learn_(model: nn.Module, name: str, grid: Grid, units: Units) -> None:
    """Round the parameter `name` to a grid with learned steps, in every layer that uses it."""
    parameter = model.get_parameter(name)
    rounding = LearnedGrid(grid, units)
    rounding.factor.requires_grad_(parameter.requires_grad)
    for layer, own_name in places(model, parameter):
        parametrize.register_parametrization(layer, own_name, rounding)
