"""What all criteria for single weights share: budgets, schedule and fine-tuning. A criterion adds its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from rarefy.errors import StageError
from rarefy.task import Task
from rarefy.technique import Analysis, Technique
from rarefy.weights import LayerWeight, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.weights.budget import Blocks, Budget
from rarefy_pruning.weights.config import WeightPruning
from rarefy_pruning.weights.dropout import Dropouts
from rarefy_pruning.weights.rules import GradualPruning
from rarefy_pruning.weights.schedules import AtEnd, Cubic, Rounds, Schedule

ConfigT = TypeVar("ConfigT", bound=WeightPruning)
Measured = Mapping[str, torch.Tensor]


class WeightCriterion(Technique[ConfigT]):
    """Prunes the weights with the lowest score; write `score`, and `measure` or `observe` when it takes data.

    The weights themselves carry the state: a removed one is an exact zero and stays so, because fine-tuning resets it
    after each optimizer step. A gradual schedule therefore only ever removes more, and nothing grows back. What a
    criterion measures is measured on the model as it is, anew each time that a schedule prunes.
    """

    def __init__(self, config: ConfigT) -> None:
        super().__init__(config)
        self.task: Task | None = None
        """Where `measure` finds data once `transform` was called."""
        self.shares: dict[str, float | None] | None = None
        """What `transform` found: the layers to prune, each with the share of zeros that it has for itself, or None."""
        self.dropouts: Dropouts | None = None
        """Dropout that an iterative schedule adjusts."""

    def score(self, weight: torch.Tensor, *measured: torch.Tensor) -> torch.Tensor:
        """Return the importance of each weight, same shape; the lowest go first.

        `measured` is the one tensor that `measure` found for the layer; nothing when it found none.
        """
        raise NotImplementedError

    def measure(self, model: nn.Module, weights: Sequence[LayerWeight], task: Task) -> Measured:
        """Return a tensor per name of a layer, measured on data; read only."""
        return {}

    def observe(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take note of a layer's weight and gradient before an optimizer step of the fine-tuning."""

    def penalty(self, weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return a scalar to add to the loss of the fine-tuning, or None."""
        return None

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which weights would go if all were removed at once; the plan is what was measured."""
        _, skipped = layer_weights(model, self.config)
        budgets, unnamed = self._budgets(model)
        skipped += [_skip(w, "no pattern of `per_layer` matches it and no `amount` is given") for w in unnamed]
        measured = self._measure(model, budgets, task)
        layers = []
        for budget in budgets:
            for weight, mask in zip(budget.weights, self._masks(budget, budget.amount, measured), strict=True):
                alive = weight.parameter != 0
                before, after = int(alive.sum()), int((alive & mask).sum())
                if before == after:
                    skipped.append(_skip(weight, budget.why_unchanged(weight)))
                else:
                    # how a common budget falls on its layers can change while it is spent during fine-tuning
                    open_ended = self.config.schedule != "one-shot" and len(budget.weights) > 1
                    layers.append(_report(weight, before, after, "about " if open_ended else ""))
        return Analysis(tuple(layers), tuple(skipped), measured)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Remove the weights, unless the schedule does so during fine-tuning."""
        self.task = task
        self.shares = self._shares(model)
        if self.config.schedule == "iterative":
            self.dropouts = Dropouts(model, task.example_inputs(), [w.name for w in _weights(self.budgets(model))])
        if self.config.schedule == "one-shot":
            for budget in self.budgets(model):
                self._cut_(budget, budget.amount, analysis.plan)
        return model

    def training_rule(self, model: nn.Module) -> GradualPruning:
        """Return what keeps zeros zero and, for a gradual schedule, makes more of them."""
        return GradualPruning(self, model, self._schedule())

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave exactly the number of weights asked for, also when fine-tuning ended before the schedule did."""
        self.prune_(model, [budget.amount for budget in self.budgets(model)])
        self.notes += self.dropouts.notes(model) if self.dropouts is not None else []
        return model

    def budgets(self, model: nn.Module) -> list[Budget]:
        """Return the groups of weights that are pruned together, in the order of the layers."""
        return self._budgets(model)[0]

    def prune_(self, model: nn.Module, sparsities: Sequence[float]) -> None:
        """Zero the lowest-scored weights in place, each budget's up to its sparsity; measure only if any must go."""
        pairs = zip(self.budgets(model), sparsities, strict=True)
        due = [(budget, sparsity) for budget, sparsity in pairs if not budget.met(sparsity)]
        measured = self._measure(model, [budget for budget, _ in due], self.task) if due else {}
        for budget, sparsity in due:
            self._cut_(budget, sparsity, measured)
        if self.dropouts is not None:
            self.dropouts.adjust_(model)

    def _schedule(self) -> Schedule:
        config = self.config
        kinds = {"cubic": Cubic(config.ramp or 0.75, config.updates or 50), "iterative": Rounds(config.rounds or 4)}
        return kinds.get(config.schedule, AtEnd())

    def _budgets(self, model: nn.Module) -> tuple[list[Budget], list[LayerWeight]]:
        shares = self._shares(model) if self.shares is None else self.shares
        # a layer that was skipped for being all zeros may have come to life since, and is left alone all the same
        weights = [w for w in layer_weights(model, self.config)[0] if w.name in shares]
        if self.config.pattern is not None:
            keep, of = map(int, self.config.pattern.split(":"))
            return [Blocks([w], 1 - keep / of, of) for w in weights], []
        alone = Blocks if self.config.scope == "row" else Budget
        single = [alone([w], amount) for w in weights if (amount := shares[w.name]) is not None]
        rest = [w for w in weights if shares[w.name] is None]
        if self.config.amount is None or not rest:
            return single, rest
        common = [Budget(rest, self.config.amount)] if self.config.scope == "global" else []
        return [*single, *common, *(alone([w], self.config.amount) for w in rest if not common)], []

    def _shares(self, model: nn.Module) -> dict[str, float | None]:
        """Return for each layer to prune the share of zeros that it has for itself, or None."""
        weights, skipped = layer_weights(model, self.config)
        own = per_layer([w.name for w in weights] + [s.name for s in skipped], self.config.per_layer, None)
        shares = {w.name: own[w.name] for w in weights}
        if self.config.sensitivity is not None:
            low = {w.name: _share_below(w.parameter, self.config.sensitivity) for w in weights if own[w.name] is None}
            shares.update(low)
        return shares

    def _measure(self, model: nn.Module, budgets: Sequence[Budget], task: Task | None) -> Measured:
        weights = _weights(budgets)
        measured = self.measure(model, weights, task) if weights else {}
        missing = [w.name for w in weights if measured and w.name not in measured]
        broken = [name for name, tensor in measured.items() if not torch.isfinite(tensor).all()]
        for names, what in ((missing, "takes no part in it"), (broken, "has NaN or infinite values")):
            if names:
                raise StageError(
                    f"{self.config.registered_name()!r} measures each layer on data, and {names[0]!r} {what}; "
                    "mend that, or leave the layer out with `targets.exclude`"
                )
        return measured

    @torch.no_grad()
    def _masks(self, budget: Budget, sparsity: float, measured: Measured) -> list[torch.Tensor]:
        scores = []
        for weight in budget.weights:
            found = [measured[weight.name]] if weight.name in measured else []
            p = weight.parameter
            # half precision would overflow in squares; what is zero already goes first, whatever its score
            single = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
            scores.append(self.score(single, *found).masked_fill(p == 0, -torch.inf))
        return budget.masks(scores, sparsity)

    @torch.no_grad()
    def _cut_(self, budget: Budget, sparsity: float, measured: Measured) -> None:
        for weight, mask in zip(budget.weights, self._masks(budget, sparsity, measured), strict=True):
            weight.parameter.masked_fill_(~mask, 0)


def _weights(budgets: Sequence[Budget]) -> list[LayerWeight]:
    return [weight for budget in budgets for weight in budget.weights]


def _share_below(weight: torch.Tensor, sensitivity: float) -> float:
    """Return the share of zeros once all |w| < sensitivity * (deviation of what is not zero) are zero."""
    deviation = weight.detach()[weight != 0].double().std(correction=0)
    return float((weight.detach().abs() < sensitivity * deviation).double().mean())


def _skip(weight: LayerWeight, reason: str) -> SkippedLayer:
    return SkippedLayer(name=weight.name, kind=weight.kind, reason=reason)


def _report(weight: LayerWeight, before: int, after: int, about: str) -> LayerReport:
    total = weight.parameter.numel()
    return LayerReport(
        name=weight.name,
        kind=weight.kind,
        action=f"keep {about}{after:,} of {before:,} weights ({after / total:.1%})",
        scores={"sparsity": 1 - after / total, "parameters_after": after},
    )
