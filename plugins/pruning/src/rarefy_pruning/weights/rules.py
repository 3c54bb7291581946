"""What pruning of single weights adds to fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rarefy.technique import TrainingRule
from rarefy.weights import layer_weights
from torch import nn

from rarefy_pruning.weights.schedules import Schedule

if TYPE_CHECKING:
    from rarefy_pruning.weights.criterion import WeightCriterion


class GradualPruning(TrainingRule):
    """Keeps zeros at zero and raises the sparsity from what it is to the budgets', whenever an update is due."""

    def __init__(self, criterion: WeightCriterion[Any], model: nn.Module, schedule: Schedule) -> None:
        self.criterion, self.schedule = criterion, schedule
        self.layers = [weight.name for weight in layer_weights(model, criterion.config)[0]]
        self.starts = [1 - budget.alive / budget.total for budget in criterion.budgets(model)]
        self.done = 0
        self.hold(model)

    def hold(self, model: nn.Module) -> None:
        """Take the zeros of `model` as those to keep."""
        self.zeros = [weight == 0 for weight in self._weights(model)]

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Return the criterion's penalty."""
        return self.criterion.penalty(self._weights(model))

    def before_step(self, model: nn.Module) -> None:
        """Let the criterion see the gradients."""
        for name, weight in zip(self.layers, self._weights(model), strict=True):
            if weight.grad is not None:
                self.criterion.observe(name, weight.detach(), weight.grad)

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Hold the zeros, and prune when the next of the updates is due."""
        with torch.no_grad():
            for weight, zeros in zip(self._weights(model), self.zeros, strict=True):
                weight.masked_fill_(zeros, 0)
        due = self.schedule.due(progress)
        if due == self.done:
            return
        self.done = due
        ends = [budget.amount for budget in self.criterion.budgets(model)]
        pairs = zip(self.starts, ends, strict=True)
        self.criterion.prune_(model, [self.schedule.sparsity(start, end, due) for start, end in pairs])
        self.hold(model)

    def _weights(self, model: nn.Module) -> list[nn.Parameter]:
        return [model.get_parameter(f"{name}.weight") for name in self.layers]
