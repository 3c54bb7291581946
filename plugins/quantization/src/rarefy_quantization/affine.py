"""What all techniques on evenly spaced values have in common: layers, grids, training and what remains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from rarefy.rules import KeepZeros
from rarefy.task import Task
from rarefy.technique import Technique, TrainingRule
from rarefy.weights import LayerWeight, per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.allocation import allocate
from rarefy_quantization.codes import entropy
from rarefy_quantization.config import GridQuantization
from rarefy_quantization.grids import Grid, Units
from rarefy_quantization.parametrizations import make_plain_
from rarefy_quantization.training import LearnedGrid, learn_

ConfigT = TypeVar("ConfigT", bound=GridQuantization)


class GridQuantizer(Technique[ConfigT]):
    """Leaves weights that are integers times step sizes; weights that are exactly zero stay zero."""

    def units(self, weight: torch.Tensor) -> Units:
        """Return what of a weight has a step size of its own."""
        return Units.of(weight.shape, self.config.granularity, self.config.group_size)

    def widths(
        self, model: nn.Module, weights: Sequence[LayerWeight], skipped: Sequence[SkippedLayer], task: Task
    ) -> dict[str, int]:
        """Return the bits of each layer: those of the options, or those that fit the target best."""
        names = [layer.name for layer in (*weights, *skipped)]
        target = self.config.target
        if target is None or not weights:
            return per_layer(names, self.config.per_layer, self.config.bits)
        given = per_layer(names, self.config.per_layer, 0)
        sizes = {weight.name: weight.parameter.numel() for weight in weights}
        fixed = {name: given[name] for name in sizes if given[name]}
        chosen = allocate(model, self.config, target, sizes, fixed, task)
        whole = sum(size * chosen[name] for name, size in sizes.items())
        self.notes.append(f"codes of {whole / sum(sizes.values()):.2f} bits per weight, {whole / 8:,.0f} bytes in all")
        return {**given, **chosen}

    @torch.no_grad()
    def quantize_(self, model: nn.Module, name: str, grid: Grid) -> None:
        """Round the parameter `name` to its grid, or have the fine-tuning do so at every step."""
        weight = model.get_parameter(name)
        units = self.units(weight)
        if self.config.finetune is not None:
            learn_(model, name, grid, units)
        else:
            weight.copy_(units.join(grid.snap(units.split(weight))))

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what keeps zeros zero."""
        return KeepZeros(model)

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave plain weights with the values of their grids."""
        make_plain_(model, LearnedGrid)
        return model

    def action(self, bits: int) -> str:
        """Return what is done to a layer, in words."""
        per = f"group of {self.config.group_size}" if self.config.granularity == "group" else self.config.granularity
        kind = "symmetric" if self.config.symmetric else "affine"
        return f"{bits} bits, {kind}, a step per {per}"

    def report(self, weight: LayerWeight, bits: int, grid: Grid) -> LayerReport:
        """Return what rounding to a grid does to a layer."""
        split = self.units(weight.parameter).split(weight.parameter.detach())
        error = grid.error(split).sum() / split.square().sum(dtype=torch.float64)
        codes = self.units(weight.parameter).join(grid.codes(split))
        scores = {"bits": bits, "steps": grid.step.numel(), "relative_mse": float(error), "entropy": entropy(codes)}
        return LayerReport(name=weight.name, kind=weight.kind, action=self.action(bits), scores=scores)
