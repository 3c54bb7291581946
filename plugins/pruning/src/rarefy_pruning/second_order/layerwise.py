"""What the layer-wise pruning techniques share: which layers, and how many of their weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from rarefy.hessian import InputHessian
from rarefy.layerwise import LayerCalibration, solve_layers_, worst_error
from rarefy.rules import KeepZeros
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule
from rarefy.weights import LayerWeight, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.second_order.config import OBSConfig, SparseGPTConfig

ConfigT = TypeVar("ConfigT", bound=SparseGPTConfig | OBSConfig)


class Layerwise(Technique[ConfigT]):
    """Prunes one layer after the other so that its outputs stay the nearest; write `solve`."""

    dtype = torch.float32
    """Precision of the Hessian and of what is computed with it."""

    def solve(self, layer: nn.Module, hessian: InputHessian, zeros: int) -> torch.Tensor:
        """Return the rows of the layer, as those of `as_rows`, with `zeros` of its weights zero."""
        raise NotImplementedError

    def zeros(self, weight: LayerWeight, amount: float | None) -> int | None:
        """Return how many weights of a layer are to be zero, or None for none; a layer keeps at least one."""
        total = weight.parameter.numel()
        return None if amount is None else min(round(amount * total), total - 1)

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say how many weights each layer keeps, in the order in which the data reaches the layers."""
        weights, skipped = layer_weights(model, self.config)
        names = [w.name for w in weights] + [s.name for s in skipped]
        amounts = per_layer(names, self.config.per_layer, self.config.amount)
        layers, plan = [], {}
        for weight, obstacle in self.calibration(task).order(model, weights):
            zeros = self.zeros(weight, amounts[weight.name])
            reason = _why_not(weight, zeros, obstacle)
            if reason is not None:
                skipped.append(SkippedLayer(name=weight.name, kind=weight.kind, reason=reason))
            else:
                plan[weight.name] = zeros
                layers.append(_report(weight, zeros))
        return Analysis(tuple(layers), tuple(skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Prune the planned layers, each calibrated on the model as it is then, or on the model as it was."""

        def solve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            return self.solve(layer, hessian, analysis.plan[name])

        calibration, sequential = self.calibration(task), self.config.sequential
        errors = solve_layers_(model, analysis.plan, calibration, solve, sequential, "pruning")
        if errors:
            self.notes.append(worst_error(errors))
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what keeps zeros zero."""
        return KeepZeros(model)

    def calibration(self, task: Task) -> LayerCalibration:
        """Return the data and the limits of the options."""
        options = self.config
        return LayerCalibration(task, options.batches, options.batch_size, options.max_inputs, self.dtype)


def _why_not(weight: LayerWeight, zeros: int | None, obstacle: str | None) -> str | None:
    """Return why a weight is left alone, or None."""
    if zeros is None:
        return "no pattern of `per_layer` matches it and no `amount` is given"
    if obstacle is not None:
        return obstacle
    have, total = int((weight.parameter == 0).sum()), weight.parameter.numel()
    if have >= zeros:
        return f"{have:,} of its {total:,} weights are zero already, and {zeros:,} are to be by the options"
    return None


def _report(weight: LayerWeight, zeros: int) -> LayerReport:
    total, before = weight.parameter.numel(), int(weight.parameter.count_nonzero())
    return LayerReport(
        name=weight.name,
        kind=weight.kind,
        action=f"keep {total - zeros:,} of {before:,} weights ({1 - zeros / total:.1%}) and correct them",
        scores={"sparsity": zeros / total, "parameters_after": total - zeros},
    )
