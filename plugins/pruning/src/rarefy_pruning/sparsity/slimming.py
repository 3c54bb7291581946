"""Network slimming: channels are judged by the batch norm scales that training made sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rarefy.dependencies import Dependencies, Group, find_dependencies
from rarefy.measure.mode import device_of, move
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule, refuse_not_finite, select
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.sparsity.config import NetworkSlimmingConfig
from rarefy_pruning.sparsity.constants import signals
from rarefy_pruning.sparsity.members import Layers, groups_of
from rarefy_pruning.sparsity.removal import absorbable, cut_constant, readers
from rarefy_pruning.sparsity.rules import training_rule
from rarefy_pruning.sparsity.scales import refusals, scales
from rarefy_pruning.sparsity.slices import Slices, Structures
from rarefy_pruning.weights.masks import keep_largest


class NetworkSlimming(Technique[NetworkSlimmingConfig]):
    """L1 on the scales, then a cut by their global quantile (Liu et al. 2017, eq. 1 and section 3).

    Channels that share a residual stream go together, by the largest of their scales. A channel whose scale is zero
    still carries the constant that its shift makes; the layers that read it take that into their biases.
    """

    dependencies = Dependencies((), ())
    groups: Sequence[Group] = ()
    inputs: tuple[Any, ...] = ()

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Find the groups whose units fall silent when the scales of their batch norms do, all of them targets."""
        targets = dict(select(model, self.config))
        inputs = move(task.example_inputs(2), device_of(model))
        dependencies = find_dependencies(model, inputs)
        refused = refusals(model, inputs, dependencies, targets)
        groups: dict[str, Group] = {}
        layers, skipped = [], []
        for name, layer in targets.items():
            if layer.weight is not None:
                refuse_not_finite(name, layer.weight)
            mine = groups_of(dependencies, f"{name}.weight", 0)
            free = [group for group in mine if group.name not in refused]
            groups.update({group.name: group for group in free})
            if free:
                layers.append(_report(name, layer, free))
            else:
                reason = refused[mine[0].name] if mine else "it has no scales, or nothing can be cut by them"
                skipped.append(SkippedLayer(name=name, kind=type(layer).__name__, reason=reason))
        return Analysis(tuple(layers), tuple(skipped), (dependencies, tuple(groups.values())))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Change nothing yet; the scales are cut by when they are trained."""
        self.dependencies, self.groups = analysis.plan
        self.inputs = move(task.example_inputs(2), device_of(model))
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule | None:
        """Return the L1 penalty on each scale, or its proximal operator, the soft threshold."""
        config = self.config
        if config.strength is None or config.finetune is None:
            return None
        single = [
            Structures(m.tensor, (Slices(m.tensor, (m.dim,), m.indices.reshape(-1, 1)),))
            for group in self.groups
            for m in scales(model, group)
        ]
        return training_rule(config.method, single, model, config.strength, config.finetune, weighted=False)

    @torch.no_grad()
    def consolidate(self, model: nn.Module) -> nn.Module:
        """Cut the channels with the smallest scales, the strongest of each group excepted."""
        if not self.groups:
            return model
        scores = [_score(model, group) for group in self.groups]
        total = sum(len(score) for score in scores)
        kept = max(len(scores), total - round(self.config.amount * total))
        masks = keep_largest(scores, kept)
        removal = {g.name: (~mask).nonzero().flatten() for g, mask in zip(self.groups, masks, strict=True)}
        self._tell(scores, masks)
        return self._cut(model, {name: units for name, units in removal.items() if len(units)})

    def _cut(self, model: nn.Module, removal: dict[str, torch.Tensor]) -> nn.Module:
        layers, groups = Layers.of(model), [group for group in self.groups if group.name in removal]
        for group in groups:
            for member in scales(model, group):
                model.get_parameter(member.tensor)[member.indices[removal[group.name]].flatten()] = 0
        found = signals(model, self.inputs, readers(groups, layers))
        rough = sum(int((~absorbable(group, layers, found))[removal[group.name]].sum()) for group in groups)
        if rough:
            self.notes.append(
                f"{rough} of the channels cut fed a constant to layers that pad with zeros or have groups; the biases "
                "take it over away from the borders, and not within groups."
            )
        return cut_constant(model, self.inputs, self.dependencies, removal, found)

    def _tell(self, scores: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> None:
        all_scores, all_masks = torch.cat(list(scores)), torch.cat(list(masks))
        cut = all_scores[~all_masks]
        if not len(cut):
            self.notes.append("No channel was cut: `amount` is less than one channel, or each group has but one.")
            return
        self.notes.append(
            f"Channels cut: {len(cut)} of {len(all_scores)}, with scales up to {float(cut.max()):.3g}; kept from "
            f"{float(all_scores[all_masks].min()):.3g}."
        )
        threshold = all_scores.sort().values[len(cut) - 1]
        emptied = [
            group.name
            for group, score in zip(self.groups, scores, strict=True)
            if len(score) > 1 and bool((score <= threshold).all())
        ]
        if emptied:
            self.notes.append(
                f"All scales of {', '.join(emptied)} are among the smallest; the largest of each was kept."
            )


def _score(model: nn.Module, group: Group) -> torch.Tensor:
    """Return the largest |scale| of each unit over the batch norms it passes, `(units,)`."""
    found = [model.get_parameter(m.tensor).abs().cpu()[m.indices].amax(1) for m in scales(model, group)]
    return torch.stack(found).amax(0)


def _report(name: str, layer: nn.Module, groups: Sequence[Group]) -> LayerReport:
    units = sum(group.units for group in groups)
    coupled = {m.tensor.rpartition(".")[0] for group in groups for m in group.members} - {name}
    action = f"cut the channels with the smallest of {units} scales, with their slices of {len(coupled)} other layers"
    return LayerReport(name=name, kind=type(layer).__name__, action=action, scores={"channels": units})
