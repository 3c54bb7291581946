"""What all criteria for channels share: groups, budgets, the cut. A criterion adds its score."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rarefy.dependencies import Dependencies, Group, Removal, cut, find_dependencies
from rarefy.errors import StageError
from rarefy.measure import flops, parameters
from rarefy.measure.mode import device_of, move
from rarefy.modules.skeleton import meta_copy
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite
from rarefy.weights import per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.channels.allocation import lowest, merged, normalized, pools, reach
from rarefy_pruning.channels.config import ChannelPruning, Target
from rarefy_pruning.channels.units import Units, units_of

ConfigT = TypeVar("ConfigT", bound=ChannelPruning)


@dataclass(frozen=True)
class ChannelPlan:
    """What `transform` cuts."""

    dependencies: Dependencies
    removal: Removal


class ChannelCriterion(Technique[ConfigT]):
    """Prunes the units with the lowest score; write `score`, and `measure` when it looks at data."""

    def score(self, units: Units) -> torch.Tensor | str:
        """Return the importance of each unit, `(units,)`, the lowest going first, or why it cannot be told."""
        raise NotImplementedError

    def measure(self, model: nn.Module, units: Sequence[Units], task: Task) -> None:
        """Look at data, once, before the scores."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Find the groups, score their units and choose those that go."""
        for name, parameter in model.named_parameters():
            refuse_not_finite(name.rpartition(".")[0], parameter)
        inputs = move(task.example_inputs(1), device_of(model))
        found = find_dependencies(model, inputs)
        groups, skipped = self._eligible(model, found)
        scores, unknown = self._scores(model, units_of(model, groups), task)
        skipped += unknown
        removal = self._choose(model, found, groups, scores, inputs) if scores else {}
        layers = []
        for group in (g for g in groups if g.name in scores):
            if group.name in removal:
                layers.append(_report(model, group, scores[group.name], removal[group.name]))
            else:
                skipped.append(_skip(model, group, "all its units stay: they are not among the lowest, or too few"))
        return Analysis(tuple(layers), tuple(skipped), ChannelPlan(found, removal))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Cut the chosen units."""
        plan: ChannelPlan = analysis.plan
        return cut(model, plan.dependencies, plan.removal)

    def _eligible(self, model: nn.Module, found: Dependencies) -> tuple[list[Group], list[SkippedLayer]]:
        """Return the groups to score, and why the others are left alone."""
        groups, skipped = [], [_skip(model, group, group.pinned or "") for group in found.pinned]
        taken: dict[tuple[str, int], str] = {}
        preferred = "block" if self.config.blocks == "whole" else "position"
        for group in sorted(found.groups, key=lambda g: g.overlaps and g.kind != preferred):
            places = [(m.tensor, m.dim) for m in group.members] if group.overlaps else []
            other = next((taken[place] for place in places if place in taken), None)
            if (layer := _missed(model, group, self.config)) is not None:
                skipped.append(_skip(model, group, f"{layer!r}, which produces it, is no target"))
            elif group.changes_statistics and not self.config.statistics:
                skipped.append(_skip(model, group, "a statistic is taken over it, and `statistics` is false"))
            elif other is not None:
                skipped.append(_skip(model, group, f"{other!r} cuts the same weights another way (see `blocks`)"))
            else:
                groups.append(group)
                taken.update(dict.fromkeys(places, group.name))
        if not groups:
            reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:8])
            raise StageError(
                f"{self.config.registered_name()!r} finds no group of channels that it may cut; targets include "
                f"{list(self.config.targets.include)}, exclude {list(self.config.targets.exclude)}. {reasons}"
            )
        order = {group.name: i for i, group in enumerate(found.groups)}
        return sorted(groups, key=lambda group: order[group.name]), skipped

    def _scores(
        self, model: nn.Module, units: Sequence[Units], task: Task
    ) -> tuple[dict[str, torch.Tensor], list[SkippedLayer]]:
        self.measure(model, units, task)
        scores, skipped = {}, []
        with torch.no_grad():
            for u in units:
                score = self.score(u)
                if isinstance(score, str):
                    skipped.append(_skip(model, u.group, score))
                    continue
                if score.shape != (u.size,) or not torch.isfinite(score).all():
                    raise StageError(
                        f"{type(self).__name__}.score gave {tuple(score.shape)} values for the {u.size} units of "
                        f"{u.group.name!r}, or some that are not finite; return one finite score per unit"
                    )
                scores[u.group.name] = score.detach().float().cpu()
        return scores, skipped

    def _choose(
        self,
        model: nn.Module,
        found: Dependencies,
        groups: Sequence[Group],
        scores: Mapping[str, torch.Tensor],
        inputs: tuple[Any, ...],
    ) -> dict[str, torch.Tensor]:
        """Return the units to remove."""
        config = self.config
        own = per_layer(list(scores), config.per_layer, None)
        fixed = merged(
            [
                lowest(pool, amount, config.least, config.round_to)
                for name, amount in own.items()
                if amount is not None
                for pool in pools({name: scores[name]}, None)
            ]
        )
        rest = {name: score for name, score in scores.items() if own[name] is None}
        if not rest or (config.amount is None and config.target is None):
            return fixed
        compared = normalized(rest) if config.normalize == "mean" else rest
        together = pools(compared, _kinds(model, groups, config.scope))

        def removal(amount: float) -> dict[str, torch.Tensor]:
            return merged([fixed, *(lowest(pool, amount, config.least, config.round_to) for pool in together)])

        if config.target is None:
            assert config.amount is not None
            return removal(config.amount)
        left = _Left(model, found, config.target, inputs)
        chosen = removal(reach(config.target.share, lambda amount: left(removal(amount))))
        if (share := left(chosen)) > config.target.share:
            self.notes.append(
                f"{share:.1%} of the {config.target.measure} is left, {config.target.share:.1%} was asked for: more "
                "cannot be cut; lower `least`, or target more layers"
            )
        return chosen


class _Left:
    """The share of a measure that a removal leaves."""

    def __init__(self, model: nn.Module, found: Dependencies, target: Target, inputs: tuple[Any, ...]) -> None:
        self.model, self.found = meta_copy(model), found
        self.inputs, self.measure = move(inputs, "meta"), target.measure
        self.whole = self._measure(self.model)
        self.known: dict[tuple[tuple[str, int], ...], float] = {}

    def __call__(self, removal: Removal) -> float:
        """Return the share, remembering widths seen before."""
        key = tuple((name, len(units)) for name, units in sorted(removal.items()))
        if key not in self.known:
            self.known[key] = self._measure(cut(self.model, self.found, removal)) / self.whole
        return self.known[key]

    def _measure(self, model: nn.Module) -> float:
        if self.measure == "flops":
            return flops(model, self.inputs)
        if self.measure == "parameters":
            return parameters(model)
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _kinds(model: nn.Module, groups: Sequence[Group], scope: str) -> dict[str, Hashable] | None:
    """Return which groups compete: all, or those of like structure (Fang et al. 2024, isomorphic pruning)."""
    if scope == "layer":
        return None
    if scope == "global":
        return {group.name: 0 for group in groups}
    return {group.name: tuple(sorted(_roles(model, group))) for group in groups}


def _roles(model: nn.Module, group: Group) -> Iterator[tuple[str, str, int]]:
    """Yield what each member of a group is: class of its module, name of the tensor there, dimension."""
    for member in group.members:
        owner, _, leaf = member.tensor.rpartition(".")
        yield type(model.get_submodule(owner)).__name__, leaf, member.dim


def _missed(model: nn.Module, group: Group, config: ChannelPruning) -> str | None:
    """Return a layer that makes the units and is no target, None when all are."""
    (units,) = units_of(model, [group])
    for member in units.makers or group.members[:1]:
        layer = member.tensor.rpartition(".")[0]
        if not config.targets.matches(layer, type(units.owners[member.tensor]).__name__):
            return layer
    return None


def _kind(model: nn.Module, group: Group) -> str:
    return f"{group.kind}s of {type(model.get_submodule(group.members[0].tensor.rpartition('.')[0])).__name__}"


def _skip(model: nn.Module, group: Group, reason: str) -> SkippedLayer:
    return SkippedLayer(name=group.name, kind=_kind(model, group), reason=reason)


def _report(model: nn.Module, group: Group, score: torch.Tensor, gone: torch.Tensor) -> LayerReport:
    kept = group.units - len(gone)
    return LayerReport(
        name=group.name,
        kind=_kind(model, group),
        action=f"keep {kept} of {group.units} {group.kind}s, in {len(group.members)} tensors",
        scores={
            "units_after": kept,
            "lowest_score": float(score.min()),
            "highest_score_removed": float(score[gone].max()),
            "highest_score": float(score.max()),
        },
    )
