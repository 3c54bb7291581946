"""Uniform quantization of weights."""

from __future__ import annotations

import torch
from rarefy.hessian import as_rows
from rarefy.task import Task
from rarefy.technique import Analysis
from rarefy.weights import holders, layer_weights
from torch import nn

from rarefy_quantization.affine import GridQuantizer
from rarefy_quantization.bias import correct_biases_, mean_inputs
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.ranges import fit_grid


class Uniform(GridQuantizer[UniformConfig]):
    """Rounds each weight to the nearest value of its grid."""

    @torch.no_grad()
    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Find the grids of every target layer and say with what error."""
        weights, skipped = layer_weights(model, self.config)
        bits = self.widths(model, weights, skipped, task)
        layers, plan = [], {}
        for weight in weights:
            width, parameter = bits[weight.name], weight.parameter.detach()
            plan[weight.name] = fit_grid(self.units(parameter).split(parameter), width, self.config)
            layers.append(self.report(weight, width, plan[weight.name]))
        return Analysis(tuple(layers), tuple(skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Round the weights, and take the mean error off the biases on demand."""
        users = [user for name in analysis.plan for user in holders(model, model.get_submodule(name).weight)]
        means = mean_inputs(model, users, task, self.config.batches) if self.config.correct_bias else {}
        before = {name: as_rows(model.get_submodule(name)).detach().clone() for name in means}
        for name, grid in analysis.plan.items():
            self.quantize_(model, f"{name}.weight", grid)
        correct_biases_(model, before, means)
        return model
