"""Data-free parameter pruning: neurons that do nearly the same become one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from rarefy.dependencies import Dependencies, Group, cut, find_dependencies
from rarefy.errors import StageError
from rarefy.measure.mode import device_of, move
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite, select
from rarefy.weights import per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.sharing.config import DataFreeConfig
from rarefy_pruning.sharing.merging import Merge, distances, merge_order, ordinary
from rarefy_pruning.sharing.neurons import Neurons, incoming, merge_columns_, neurons_of, outgoing
from rarefy_pruning.sharing.probe import why_not_alike

_CUTOFF = 0.1
"""Without fine-tuning, four networks for digits lost 1.1 points of accuracy at most; at 0.25 it was 13."""


@dataclass(frozen=True, eq=False)
class Merging:
    """The merges of one group of neurons."""

    group: str
    neurons: Neurons
    merges: tuple[Merge, ...]

    def merge_(self, model: nn.Module) -> None:
        """Add up the weights by which the neurons are read; the removed ones are read no more."""
        for member in self.neurons.readers:
            merge_columns_(model.get_parameter(member.tensor), member.indices, self.merges)

    @property
    def removed(self) -> torch.Tensor:
        """The units that go."""
        return torch.tensor([merge.removed for merge in self.merges])


@dataclass(frozen=True, eq=False)
class MergingPlan:
    """What `transform` carries out."""

    dependencies: Dependencies
    mergings: tuple[Merging, ...]


class DataFree(Technique[DataFreeConfig]):
    """Merges neurons layer by layer, each with the weights that the merging of the layers before it left.

    Besides linear layers, of which the paper speaks, the channels of convolutions are merged in the same way; the
    kernels that read a channel are its outgoing weights.
    """

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Find the merges of every target layer, and why others have none."""
        targets = list(select(model, self.config))
        amounts = per_layer([name for name, _ in targets], self.config.per_layer, self.config.amount)
        for name, layer in targets:
            for tensor in layer.parameters(recurse=False):
                refuse_not_finite(name, tensor)
        inputs = move(task.example_inputs(4), device_of(model))
        dependencies = find_dependencies(model, inputs)
        work = copy.deepcopy(model).eval()
        layers, skipped, mergings = [], [], []
        for name, layer in targets:
            kind = type(layer).__name__
            merging = self._merging(work, dependencies, name, amounts[name], inputs)
            if isinstance(merging, str):
                skipped.append(SkippedLayer(name=name, kind=kind, reason=merging))
            else:
                merging.merge_(work)
                mergings.append(merging)
                layers.append(_report(merging, kind))
        return Analysis(tuple(layers), tuple(skipped), MergingPlan(dependencies, tuple(mergings)))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Merge, and cut what was merged away."""
        for merging in analysis.plan.mergings:
            merging.merge_(model)
        removal = {merging.group: merging.removed for merging in analysis.plan.mergings}
        return cut(model, analysis.plan.dependencies, removal) if removal else model

    def _merging(
        self, model: nn.Module, dependencies: Dependencies, name: str, amount: float | None, inputs: tuple[object, ...]
    ) -> Merging | str:
        """Return the merges of a layer's neurons, or why there are none."""
        groups = _groups_of(dependencies, name)
        candidates = [neurons_of(model, group, name) for group in groups]
        refused = next((why for why in candidates if isinstance(why, str)), None)
        if refused is not None or len(groups) != 1:
            return refused or ("they fall into several groups" if groups else "running the model does not show them")
        neurons = candidates[0]
        assert isinstance(neurons, Neurons)
        if why := why_not_alike(model, neurons, inputs, derive(self.seed, name)):
            return why
        own, read_by = incoming(model, neurons), outgoing(model, neurons)
        if not (own.isfinite().all() and read_by.isfinite().all()):
            raise StageError(f"weights around {name!r} are NaN or infinite; retrain or reload the model")
        merges = self._merges(own, read_by, amount)
        return merges if isinstance(merges, str) else Merging(groups[0].name, neurons, tuple(merges))

    def _merges(self, own: torch.Tensor, read_by: torch.Tensor, amount: float | None) -> list[Merge] | str:
        units, distance = len(own), distances(own)
        if amount is None:
            cutoff = _CUTOFF if self.config.cutoff is None else self.config.cutoff
            merges = merge_order(distance, read_by, units - 1, ordinary(distance, read_by, cutoff))
            return merges or f"{cutoff:.1%} of the pairs of its {units} neurons is less than one; give `amount`"
        merges = merge_order(distance, read_by, min(units - 1, round(amount * units)))
        return merges or f"{amount:.1%} of its {units} neurons is less than one"


def _groups_of(dependencies: Dependencies, name: str) -> list[Group]:
    return [
        group
        for group in (*dependencies.groups, *dependencies.pinned)
        if any((member.tensor, member.dim) == (f"{name}.weight", 0) for member in group.members)
    ]


def _report(merging: Merging, kind: str) -> LayerReport:
    units, merges = len(merging.neurons.rows), merging.merges
    scores = {
        "neurons_before": units,
        "neurons_after": units - len(merges),
        "largest_saliency": max(merge.saliency for merge in merges),
    }
    action = f"{units - len(merges)} of {units} neurons, each of the others merged into its likest"
    return LayerReport(name=merging.neurons.layer, kind=kind, action=action, scores=scores)
