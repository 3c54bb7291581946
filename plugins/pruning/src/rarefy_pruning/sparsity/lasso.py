"""Group lasso: structures die during fine-tuning, and are cut or left as zeros."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from rarefy.measure.mode import device_of, move
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule
from rarefy.weights import LayerWeight, layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.sparsity.config import GroupLassoConfig, KernelLassoConfig
from rarefy_pruning.sparsity.find import FINDERS, Found
from rarefy_pruning.sparsity.removal import Removed, remove_dead
from rarefy_pruning.sparsity.rules import training_rule
from rarefy_pruning.sparsity.slices import norms, scale_

ConfigT = TypeVar("ConfigT", GroupLassoConfig, KernelLassoConfig)

THRESHOLD = 1e-3

NAMES = {
    "unit": "units", "filter": "filters", "channel": "input channels", "shape": "columns", "depth": "whole layers",
}  # fmt: skip


class Lasso(Technique[ConfigT]):
    """Finds the structures and regularises them; write `consolidate` to say what becomes of the dead."""

    found = Found()
    inputs: tuple[Any, ...] = ()

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """List the structures of each target layer."""
        weights, skipped = layer_weights(model, self.config)
        found = FINDERS[self.config.structure](model, weights, task)
        skipped += [
            SkippedLayer(name=weight.name, kind=weight.kind, reason=found.reasons[weight.name])
            for weight in weights
            if weight.name in found.reasons
        ]
        layers = [self._report(weight, found) for weight in weights if weight.name not in found.reasons]
        return Analysis(tuple(layers), tuple(skipped), found)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Change nothing yet; the fine-tuning does."""
        self.found = analysis.plan
        self.inputs = move(task.example_inputs(2), device_of(model))
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule | None:
        """Return the proximal steps or the penalty."""
        config = self.config
        return training_rule(
            config.method, self.found.structures, model, config.strength, config.finetune, config.weighted
        )

    @torch.no_grad()
    def count_dead_(self, model: nn.Module) -> list[str]:
        """Note how many structures are dead, after zeroing what a penalty left near zero; return what died whole.

        These are names of `Structures`: layers where each has one of them, as for `shape` and `depth`.
        """
        named = dict(model.named_parameters())
        total = dead = 0
        whole = []
        for part in self.found.structures:
            size = part.sizes(named).to(device_of(model))
            threshold = (self.config.threshold or THRESHOLD) if self.config.method == "penalty" else 0.0
            gone = norms(part, named) <= threshold * size.sqrt()
            if self.config.method == "penalty":
                scale_(part, named, (~gone).float())
            total, dead = total + len(part), dead + int(gone.sum())
            whole += [part.name] if gone.all() else []
        advice = "; lower `strength`" if dead == total else "" if dead else "; raise `strength`, or train longer"
        self.notes.append(f"Dead after training: {dead} of {total} {NAMES[self.config.structure]}{advice}.")
        return whole

    def _report(self, weight: LayerWeight, found: Found) -> LayerReport:
        structures = found.of(weight.name)
        number = sum(len(part) for part in structures)
        coupled = {part.tensor.rpartition(".")[0] for s in structures for part in s.slices} - {weight.name}
        along = f", with their slices of {len(coupled)} other layers" if coupled else ""
        what = "the whole layer" if self.config.structure == "depth" else f"{number} {NAMES[self.config.structure]}"
        action = f"train {what} to die{along}"
        return LayerReport(name=weight.name, kind=weight.kind, action=action, scores={"structures": number})


class CuttingLasso(Lasso[GroupLassoConfig]):
    """Group lasso over units, filters, channels or layers (Wen et al. 2016, section 3; Zhou et al. 2016)."""

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Cut the units that are dead in every layer; dead slices of units that live on elsewhere stay as zeros."""
        whole, layers_die = self.count_dead_(model), self.config.structure == "depth"
        removed = remove_dead(model, self.inputs, self.found.dependencies, self.found.groups)
        self.notes += _whole(whole) if layers_die else []
        self.notes += _told(removed, "" if layers_die else ": lower `strength`")
        return removed.model


class ZeroingLasso(Lasso[KernelLassoConfig]):
    """Group lasso over columns of the unrolled weights (Lebedev & Lempitsky 2016)."""

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave the zeros where they are."""
        self.notes += _whole(self.count_dead_(model))
        return model


def _whole(layers: list[str]) -> list[str]:
    return [f"All weights of {', '.join(layers)} are zero; the layers stay, and compute their bias."] if layers else []


def _told(removed: Removed, advice: str) -> list[str]:
    total, cut = sum(removed.units.values()), sum(removed.cut.values())
    notes = [f"Units cut: {cut} of {total}."]
    emptied = [name for name, dead in removed.died.items() if dead == removed.units[name]]
    if emptied:
        notes.append(f"All units of {', '.join(emptied)} died, and one of each was kept{advice}.")
    left = [name for name, dead in removed.died.items() if dead > removed.cut[name] and name not in emptied]
    if left:
        notes.append(
            f"Dead units of {', '.join(left)} stay, since the outputs would change without the constant that they "
            "still carry; `structure: unit` makes that die too."
        )
    return notes
