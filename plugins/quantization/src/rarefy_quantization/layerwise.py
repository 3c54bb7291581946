"""What techniques have in common that round one layer after the other on the inputs it gets."""

from __future__ import annotations

from typing import TypeVar

import torch
from rarefy.hessian import InputHessian
from rarefy.layerwise import LayerCalibration, solve_layers_, worst_error
from rarefy.task import Task
from rarefy.technique import Analysis
from rarefy.weights import layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.affine import GridQuantizer
from rarefy_quantization.config import CalibratedGridQuantization
from rarefy_quantization.grids import Grid

ConfigT = TypeVar("ConfigT", bound=CalibratedGridQuantization)


class LayerwiseQuantizer(GridQuantizer[ConfigT]):
    """Rounds one layer after the other so that its outputs stay the nearest; write `solve`."""

    def solve(self, layer: nn.Module, hessian: InputHessian, bits: int) -> tuple[torch.Tensor, Grid]:
        """Return the rows of the layer as they are to be rounded to the nearest values, and the grid of these."""
        raise NotImplementedError

    def reference(self, model: nn.Module) -> nn.Module | None:
        """Return what the layers' inputs are compared with, given the model as it is at first, or None."""
        return None

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which layers are quantized, in the order in which the data reaches them."""
        found, skipped = layer_weights(model, self.config)
        ordered = self._calibration(task).order(model, found)
        skipped += [SkippedLayer(name=w.name, kind=w.kind, reason=why) for w, why in ordered if why is not None]
        weights = [weight for weight, why in ordered if why is None]
        bits = self.widths(model, weights, skipped, task)
        layers, plan = [], {}
        for weight in weights:
            width = plan[weight.name] = bits[weight.name]
            layers.append(
                LayerReport(
                    name=weight.name,
                    kind=weight.kind,
                    action=self.action(width),
                    scores={"bits": width, "steps": self.units(weight.parameter).count},
                )
            )
        return Analysis(tuple(layers), tuple(skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Quantize the planned layers, each calibrated on the model as it is then, or on the model as it was."""
        found: dict[str, tuple[torch.Tensor, Grid]] = {}

        def solve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            rows, grid = found[name] = self.solve(layer, hessian, analysis.plan[name])
            units = self.units(layer.weight)
            return units.join(grid.snap(units.split(rows.reshape(units.shape)))).view_as(rows)

        errors = solve_layers_(
            model,
            analysis.plan,
            self._calibration(task),
            solve,
            self.config.sequential,
            "quantizing",
            self.reference(model),
        )
        if errors:
            self.notes.append(worst_error(errors))
        if self.config.finetune is not None:
            for name, (rows, grid) in found.items():
                weight = model.get_submodule(name).weight
                weight.data.copy_(rows.reshape(weight.shape))
                self.quantize_(model, f"{name}.weight", grid)
        return model

    def _calibration(self, task: Task) -> LayerCalibration:
        return LayerCalibration(task, self.config.batches, self.config.batch_size, self.config.max_inputs)
