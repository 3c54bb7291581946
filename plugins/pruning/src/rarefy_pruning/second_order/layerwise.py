"""What the layer-wise techniques share: which layers, their Hessians in the order of the data, and writing back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from rarefy.calibration import Visit, stream_inputs
from rarefy.hessian import InputHessian, as_rows, columns
from rarefy.progress import track
from rarefy.rules import KeepZeros
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule
from rarefy.weights import LayerWeight, holders, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.second_order.config import OBSConfig, SparseGPTConfig

ConfigT = TypeVar("ConfigT", bound=SparseGPTConfig | OBSConfig)
log = logging.getLogger(__name__)


class Layerwise(Technique[ConfigT]):
    """Prunes one layer after the other so that its outputs stay the nearest; write `solve`.

    Memory is bounded by the model and one layer's Hessian and workspace (and, without `sequential`, the new weights),
    at the price of one pass over the calibration batches per layer, up to that layer.
    """

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
        places = self._places(model, weights, task)
        layers, plan = [], {}
        for weight in sorted(weights, key=lambda w: places.get(w.name, len(places))):
            zeros = self.zeros(weight, amounts[weight.name])
            reason = self._why_not(model, weight, zeros, weight.name in places)
            if reason is not None:
                skipped.append(SkippedLayer(name=weight.name, kind=weight.kind, reason=reason))
            else:
                plan[weight.name] = zeros
                layers.append(_report(weight, zeros))
        return Analysis(tuple(layers), tuple(skipped), plan)

    @torch.no_grad()
    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Prune the planned layers, each calibrated on the model as it is then, or on the model as it was."""
        later: list[Callable[[], None]] = []
        errors: dict[str, float] = {}
        for name, zeros in track(analysis.plan.items(), "pruning", len(analysis.plan)):
            layer = model.get_submodule(name)
            hessian = self._hessian(model, name, task)
            before = as_rows(layer).to(hessian.value)
            after = self.solve(layer, hessian, zeros)
            errors[name] = hessian.error(after - before) / max(hessian.error(before), 1e-30)
            log.info("%s: the squared error of its outputs is %.2g of their square", name, errors[name])
            later.append(partial(_write_, layer, after.to(layer.weight.dtype)))
            if self.config.sequential:
                later.pop()()
        for write in later:
            write()
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            self.notes.append(f"largest relative output error of a layer: {errors[worst] ** 0.5:.1%}, at {worst!r}")
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what keeps zeros zero."""
        return KeepZeros(model)

    def _places(self, model: nn.Module, weights: list[LayerWeight], task: Task) -> dict[str, int]:
        """Return when the first batch reaches each weight, by any of its layers; absent where it does not."""
        users = {weight.name: holders(model, weight.parameter) for weight in weights}
        visits: dict[str, Visit] = {name: lambda _: None for names in users.values() for name in names}
        batch = task.calibration(self.config.batch_size, 1)
        calls = list(stream_inputs(model, batch, visits, "finding the layers that are reached", 1))
        found = {weight: [calls.index(name) for name in names if name in calls] for weight, names in users.items()}
        return {weight: min(places) for weight, places in found.items() if places}

    def _why_not(self, model: nn.Module, weight: LayerWeight, zeros: int | None, reached: bool) -> str | None:
        """Return why a weight is left alone, or None."""
        inputs, have = columns(weight.layer), int((weight.parameter == 0).sum())
        others = [name for name in holders(model, weight.parameter) if not _alike(model, weight.name, name)]
        if zeros is None:
            return "no pattern of `per_layer` matches it and no `amount` is given"
        if others:
            return f"it shares its weight with {others[0]!r}, which uses it in another way"
        if not reached:
            return "the calibration data never reaches it, or its weight is used without calling it"
        if inputs > self.config.max_inputs:
            return f"its Hessian is {inputs:,} x {inputs:,} and `max_inputs` is {self.config.max_inputs:,}"
        if have >= zeros:
            total = weight.parameter.numel()
            return f"{have:,} of its {total:,} weights are zero already, and {zeros:,} are to be by the options"
        return None

    def _hessian(self, model: nn.Module, name: str, task: Task) -> InputHessian:
        layer = model.get_submodule(name)
        # torch computes in double precision everywhere but on Apple's devices
        dtype = torch.float32 if layer.weight.device.type == "mps" else self.dtype
        hessian = InputHessian(layer, name, dtype)
        users = holders(model, layer.weight)
        visits: dict[str, Visit] = {user: partial(hessian.update, user=model.get_submodule(user)) for user in users}
        batches = task.calibration(self.config.batch_size, self.config.batches)
        stream_inputs(model, batches, visits, f"calibrating {name}", self.config.batches)
        return hessian


def _alike(model: nn.Module, one: str, other: str) -> bool:
    """Tell whether two modules multiply their weight with inputs in the same way, stride and padding aside."""
    kinds = [(type(m), getattr(m, "groups", 1)) for m in (model.get_submodule(one), model.get_submodule(other))]
    return kinds[0] == kinds[1]


def _write_(layer: nn.Module, rows: torch.Tensor) -> None:
    layer.weight.copy_(rows.reshape(layer.weight.shape))


def _report(weight: LayerWeight, zeros: int) -> LayerReport:
    total, before = weight.parameter.numel(), int(weight.parameter.count_nonzero())
    return LayerReport(
        name=weight.name,
        kind=weight.kind,
        action=f"keep {total - zeros:,} of {before:,} weights ({1 - zeros / total:.1%}) and correct them",
        scores={"sparsity": zeros / total, "parameters_after": total - zeros},
    )
