"""What all criteria for channels share: groups, budgets, the cut. A criterion adds its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from rarefy import distributed
from rarefy.dependencies import Claims, Dependencies, Group, Removal, cut, find_dependencies
from rarefy.errors import StageError
from rarefy.measure.mode import device_of, move
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.channels.choice import Choice, Figures
from rarefy_pruning.channels.config import ChannelPruning
from rarefy_pruning.channels.reconstruction import reconstruct_
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
        removal, figures = self._chosen(model, found, scores, task) if scores else ({}, {})
        layers = []
        for group in (g for g in groups if g.name in scores):
            if group.name in removal:
                layers.append(_report(model, group, scores[group.name], removal[group.name], figures))
            else:
                skipped.append(_skip(model, group, "all its units stay: they are not among the lowest, or too few"))
        return Analysis(tuple(layers), tuple(skipped), ChannelPlan(found, removal))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Cut the chosen units, and fit what read them when that is asked for."""
        plan: ChannelPlan = analysis.plan
        compact = cut(model, plan.dependencies, plan.removal)
        if self.config.reconstruct and plan.removal:
            losses = reconstruct_(
                compact, model, plan.dependencies, plan.removal, task, self.config.reconstruct_batches
            )
            self.notes += [_told(losses)]
        return compact

    def _eligible(self, model: nn.Module, found: Dependencies) -> tuple[list[Group], list[SkippedLayer]]:
        """Return the groups to score, and why the others are left alone."""
        groups, skipped = [], [_skip(model, group, group.pinned or "") for group in found.pinned]
        claims = Claims()
        preferred = "block" if self.config.blocks == "whole" else "position"
        for group in sorted(found.groups, key=lambda g: g.overlaps and g.kind != preferred):
            if (layer := _missed(model, group, self.config)) is not None:
                skipped.append(_skip(model, group, f"{layer!r}, which produces it, is no target"))
            elif group.changes_statistics and not self.config.statistics:
                skipped.append(_skip(model, group, "a statistic is taken over it, and `statistics` is false"))
            elif (crossed := claims.take(group)) is not None:
                skipped.append(_skip(model, group, f"{crossed[0]!r} cuts the same weights another way (see `blocks`)"))
            else:
                groups.append(group)
        if not groups:
            reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:8])
            raise StageError(
                f"{self.config.registered_name()!r} finds no group of channels that it may cut; targets include "
                f"{list(self.config.targets.include)}, exclude {list(self.config.targets.exclude)}. {reasons}"
            )
        order = {group.name: i for i, group in enumerate(found.groups)}
        return sorted(groups, key=lambda group: order[group.name]), skipped

    def _chosen(
        self, model: nn.Module, found: Dependencies, scores: Mapping[str, torch.Tensor], task: Task
    ) -> tuple[Removal, Figures]:
        """Return the units to remove and the figures of each group, the same in every process."""
        choice = Choice(self.config, model, found, scores, task) if distributed.is_main() else None
        removal, figures, notes = distributed.from_main(
            (choice.removal, choice.figures, choice.notes) if choice else None
        )
        self.notes += notes
        return removal, figures

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


def _missed(model: nn.Module, group: Group, config: ChannelPruning) -> str | None:
    """Return a layer that makes the units and is no target, None when all are."""
    (units,) = units_of(model, [group])
    for member in units.makers or group.members[:1]:
        layer = member.tensor.rpartition(".")[0]
        if not config.targets.matches(layer, type(units.owners[member.tensor]).__name__):
            return layer
    return None


def _told(losses: Mapping[str, float]) -> str:
    if not losses:
        return "nothing was reconstructed: no linear layer or ungrouped convolution that the data reaches lost inputs"
    worst = max(losses, key=lambda name: losses[name])
    return f"{len(losses)} layers reconstructed; the largest loss is {losses[worst]:.1%} of the outputs of {worst!r}"


def _kind(model: nn.Module, group: Group) -> str:
    return f"{group.kind}s of {type(model.get_submodule(group.members[0].tensor.rpartition('.')[0])).__name__}"


def _skip(model: nn.Module, group: Group, reason: str) -> SkippedLayer:
    return SkippedLayer(name=group.name, kind=_kind(model, group), reason=reason)


def _report(model: nn.Module, group: Group, score: torch.Tensor, gone: torch.Tensor, figures: Figures) -> LayerReport:
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
            **figures.get(group.name, {}),
        },
    )
