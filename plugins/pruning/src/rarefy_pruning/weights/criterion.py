"""What all criteria for single weights share: budgets, masks, schedule and fine-tuning. A criterion adds its score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule
from rarefy.weights import LayerWeight, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.weights.config import WeightPruning
from rarefy_pruning.weights.masks import cubic, keep_largest

ConfigT = TypeVar("ConfigT", bound=WeightPruning)


@dataclass(frozen=True)
class Budget:
    """Weights that are pruned to a common sparsity."""

    weights: Sequence[LayerWeight]
    amount: float
    """Share of zeros at the end."""

    @property
    def total(self) -> int:
        """Number of weights, zeros included."""
        return sum(weight.parameter.numel() for weight in self.weights)

    @property
    def alive(self) -> int:
        """Number of weights that are not zero."""
        return sum(int(weight.parameter.count_nonzero()) for weight in self.weights)

    def kept(self, sparsity: float) -> int:
        """Return how many weights stay at `sparsity`: the nearest number, at least one per layer, none revived."""
        return min(self.alive, max(len(self.weights), self.total - round(sparsity * self.total)))


class WeightCriterion(Technique[ConfigT]):
    """Prunes the weights with the lowest score; write `score`.

    The weights themselves carry the state: a removed one is an exact zero and stays so, because fine-tuning resets it
    after each optimizer step. A gradual schedule therefore only ever removes more, and nothing grows back.
    """

    def score(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the importance of each weight, same shape; the lowest go first."""
        raise NotImplementedError

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which weights would go if all were removed at once."""
        _, skipped = layer_weights(model, self.config)
        budgets, unnamed = self._budgets(model)
        skipped += [_skip(w, "no pattern of `per_layer` matches it and no `amount` is given") for w in unnamed]
        layers = []
        for budget in budgets:
            for weight, mask in zip(budget.weights, self._masks(budget, budget.amount), strict=True):
                before, after = int(weight.parameter.count_nonzero()), int(mask.sum())
                if before == after:
                    skipped.append(_skip(weight, _why_unchanged(budget, before)))
                else:
                    # how a common budget falls on its layers can change while it is spent during fine-tuning
                    open_ended = self.config.schedule == "cubic" and len(budget.weights) > 1
                    layers.append(_report(weight, before, after, "about " if open_ended else ""))
        return Analysis(tuple(layers), tuple(skipped))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Remove the weights, unless the schedule does so during fine-tuning."""
        return model if self.config.schedule == "cubic" else self.consolidate(model)

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what keeps zeros zero and, for a gradual schedule, makes more of them."""
        return GradualPruning(self, model) if self.config.schedule == "cubic" else HoldZeros(self, model)

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave exactly the number of weights asked for, also when fine-tuning ended before the schedule did."""
        for budget in self.budgets(model):
            self.cut_(budget, budget.amount)
        return model

    def budgets(self, model: nn.Module) -> list[Budget]:
        """Return the groups of weights that are pruned together, in the order of the layers."""
        return self._budgets(model)[0]

    @torch.no_grad()
    def cut_(self, budget: Budget, sparsity: float) -> None:
        """Zero the lowest-scored weights in place, up to `sparsity`."""
        for weight, mask in zip(budget.weights, self._masks(budget, sparsity), strict=True):
            weight.parameter.masked_fill_(~mask, 0)

    def _budgets(self, model: nn.Module) -> tuple[list[Budget], list[LayerWeight]]:
        weights, skipped = layer_weights(model, self.config)
        names = [w.name for w in weights] + [s.name for s in skipped]
        own = per_layer(names, self.config.per_layer, None)
        single = [Budget([w], amount) for w in weights if (amount := own[w.name]) is not None]
        rest = [w for w in weights if own[w.name] is None]
        if self.config.amount is None or not rest:
            return single, rest
        parts = [rest] if self.config.scope == "global" else [[w] for w in rest]
        return [*single, *(Budget(part, self.config.amount) for part in parts)], []

    @torch.no_grad()
    def _masks(self, budget: Budget, sparsity: float) -> list[torch.Tensor]:
        parameters = [weight.parameter for weight in budget.weights]
        # what is zero already goes first, whatever its score
        scores = [self.score(p).masked_fill(p == 0, -torch.inf) for p in parameters]
        return keep_largest(scores, budget.kept(sparsity))


class HoldZeros(TrainingRule):
    """Keeps the weights at zero that are zero when fine-tuning starts."""

    def __init__(self, criterion: WeightCriterion[Any], model: nn.Module) -> None:
        weights, _ = layer_weights(model, criterion.config)
        self.names = [f"{weight.name}.weight" for weight in weights]
        self.hold(model)

    def hold(self, model: nn.Module) -> None:
        """Take the zeros of `model` as those to keep."""
        self.zeros = {name: model.get_parameter(name) == 0 for name in self.names}

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        """Zero them again."""
        for name, zeros in self.zeros.items():
            model.get_parameter(name).masked_fill_(zeros, 0)


class GradualPruning(HoldZeros):
    """Raises the sparsity from what it is to the budgets', in equal steps along a cubic (Zhu & Gupta 2017)."""

    def __init__(self, criterion: WeightCriterion[Any], model: nn.Module) -> None:
        super().__init__(criterion, model)
        self.criterion = criterion
        self.ramp = criterion.config.ramp or 0.75
        self.updates = criterion.config.updates or 50
        self.done = 0
        self.starts = [1 - budget.alive / budget.total for budget in criterion.budgets(model)]

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Hold the zeros, and prune when the next of the updates is due."""
        super().after_step(model, progress)
        # a hair more, so that rounding of `progress` does not delay an update by a step
        due = math.floor(min(1.0, progress / self.ramp) * self.updates + 1e-9)
        if due == self.done:
            return
        self.done = due
        for start, budget in zip(self.starts, self.criterion.budgets(model), strict=True):
            self.criterion.cut_(budget, cubic(start, budget.amount, due / self.updates))
        self.hold(model)


def _skip(weight: LayerWeight, reason: str) -> SkippedLayer:
    return SkippedLayer(name=weight.name, kind=weight.kind, reason=reason)


def _why_unchanged(budget: Budget, alive: int) -> str:
    if alive == 1:
        return "its last weight is kept"
    if budget.alive == budget.kept(budget.amount):
        return f"{1 - budget.alive / budget.total:.1%} of its weights are zero, {budget.amount:.1%} are asked for"
    return "none of its weights is among the lowest of all layers"


def _report(weight: LayerWeight, before: int, after: int, about: str) -> LayerReport:
    total = weight.parameter.numel()
    return LayerReport(
        name=weight.name,
        kind=weight.kind,
        action=f"keep {about}{after:,} of {before:,} weights ({after / total:.1%})",
        scores={"sparsity": 1 - after / total, "parameters_after": after},
    )
