"""Rounding up or down, learned (AdaRound)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from rarefy.hessian import InputHessian, as_rows
from torch import nn

from rarefy_quantization.grids import Grid
from rarefy_quantization.layerwise import LayerwiseQuantizer
from rarefy_quantization.ranges import fit_grid
from rarefy_quantization.rounding.config import AdaRoundConfig

STRETCH = (-0.1, 1.1)
"""Ends of the stretched sigmoid before it is clipped to [0, 1]."""
SHARPNESS = (20.0, 2.0)
"""The exponent of the regulariser at first and at last."""
FREE = 0.2
"""Share of the iterations without a regulariser."""


class AdaRound(LayerwiseQuantizer[AdaRoundConfig]):
    """Chooses the next value above or below each weight for the least error of the layer's outputs.

    The error is that of eq. 21 of the paper (Nagel et al. 2020) with the outputs of the original network as target and,
    where `sequential` is set, the inputs of the quantized one (section 3.2). It is quadratic in the weights, so that
    the second moments of the inputs take the place of the paper's mini-batches, and what comes after the layer, a
    ReLU say, is not looked at. `settle` lowers what error Adam leaves: that of the outputs of digits_cnn at 2 and 3
    bits to about a third and a half, while the accuracy of ResNet-20 stays the same (docs/benchmarks.md).
    """

    def reference(self, model: nn.Module) -> nn.Module | None:
        """Return a copy of the model whose outputs are the target."""
        return copy.deepcopy(model) if self.config.sequential else None

    def solve(self, layer: nn.Module, hessian: InputHessian, bits: int) -> tuple[torch.Tensor, Grid]:
        """Return the rounded rows of the layer and their grid."""
        rows, units = as_rows(layer).detach().to(hessian.value), self.units(layer.weight)
        grid = fit_grid(units.split(layer.weight.detach()), bits, self.config)
        ends = (units.join(end.expand(-1, units.size)).view_as(rows) for end in (grid.step, grid.low, grid.high))
        down, up = neighbours(rows, Grid(*(end.to(rows) for end in ends)))
        problem = Problem(down, up, hessian.value, rows @ hessian.cross)
        with torch.no_grad():
            exact = ((rows - down) / (up - down)).nan_to_num(0).clamp(0, 1)
        raised = learn(problem, exact, self.config)
        if self.config.settle:
            raised = settle(problem, raised)
        return torch.where(raised, up, down), grid


@dataclass(frozen=True)
class Problem:
    """Two values for each weight, all of shape `(groups, rows, columns)`, and what the error of a choice is made of."""

    down: torch.Tensor
    up: torch.Tensor
    hessian: torch.Tensor
    """H of `rarefy.hessian`, `(groups, columns, columns)`."""
    target: torch.Tensor
    """W K, with K the `cross` of `rarefy.hessian`: where the gradient of the error, Q H - W K, vanishes."""

    def error(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the squared error of the outputs, summed over the rows, less that of zero weights."""
        return ((0.5 * rows @ self.hessian - self.target) * rows).sum()

    @property
    def diagonal(self) -> torch.Tensor:
        """The diagonal of H, `(groups, 1, columns)`."""
        return self.hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(1)


def neighbours(rows: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the grid next below and above each weight; they are one where it is zero or clipped."""
    below = (rows / grid.step).floor()
    values = (code.maximum(grid.low).minimum(grid.high) * grid.step for code in (below, below + 1))
    down, up = (value.masked_fill(rows == 0, 0) for value in values)
    return down, up


def gate(values: torch.Tensor) -> torch.Tensor:
    """Return the rectified sigmoid, eq. 23: from 0, all down, to 1, all up."""
    low, high = STRETCH
    return (values.sigmoid() * (high - low) + low).clamp(0, 1)


def ungate(shares: torch.Tensor) -> torch.Tensor:
    """Return the values whose `gate` is `shares`, in [0, 1]."""
    low, high = STRETCH
    return torch.logit((shares - low) / (high - low))


def indecision(shares: torch.Tensor, sharpness: float) -> torch.Tensor:
    """Return the regulariser of eq. 24, 1 - |2h - 1|^beta: 0 where h is 0 or 1, and 1 half way."""
    return 1 - (2 * shares - 1).abs().pow(sharpness)


@torch.enable_grad()
def learn(problem: Problem, start: torch.Tensor, config: AdaRoundConfig) -> torch.Tensor:
    """Return which weights to round up, learned from `start`, their places in [0, 1] between down and up."""
    gap = problem.up - problem.down
    values = ungate(start).requires_grad_()
    optimizer = torch.optim.Adam([values], config.lr)
    # what the error grows by, on average, when a weight moves by one code
    unit = (gap.square() * problem.diagonal).mean().clamp(min=1e-30) / 2
    for number in range(config.iterations):
        shares = gate(values)
        loss = problem.error(problem.down + gap * shares) / unit
        progress = (number / config.iterations - FREE) / (1 - FREE)
        if progress >= 0:
            sharpness = SHARPNESS[1] + (1 - progress) * (SHARPNESS[0] - SHARPNESS[1])
            loss = loss + config.weight * indecision(shares, sharpness).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return values.detach() >= 0


def settle(problem: Problem, raised: torch.Tensor) -> torch.Tensor:
    """Return decisions of which none, alone, can be reversed for a lower error; in each row the best one goes first."""
    current = torch.where(raised, problem.up, problem.down)
    change = torch.where(raised, problem.down, problem.up) - current
    slope = current @ problem.hessian - problem.target
    for _ in range(2 * current.shape[-1]):
        gain, place = (change * (slope + 0.5 * change * problem.diagonal)).min(-1, keepdim=True)
        if not (gain < 0).any():
            break
        step = change.gather(-1, place).masked_fill(gain >= 0, 0)
        change = change.scatter_add(-1, place, -2 * step)
        raised = raised ^ torch.zeros_like(raised).scatter(-1, place, step != 0)
        slope += step * problem.hessian.gather(1, place.expand(-1, -1, current.shape[-1]))
    return raised
