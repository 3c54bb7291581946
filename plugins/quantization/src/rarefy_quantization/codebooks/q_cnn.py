"""Q-CNN: product codebooks that make the responses of each layer nearest to what they were."""

from __future__ import annotations

import copy
from functools import partial

import torch
from rarefy.calibration import stream_together
from rarefy.hessian import InputHessian, as_rows, vectors
from rarefy.layerwise import LayerCalibration, solve_layers_, worst_error
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis
from rarefy.weights import holders, layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.codebooks.config import QCNNConfig
from rarefy_quantization.codebooks.product import BlockQuantizer, cluster_blocks
from rarefy_quantization.codebooks.response import Responses, refitted
from rarefy_quantization.codes import share_
from rarefy_quantization.vectors import VectorCoded, uneven

_CLUSTERING = 50
"""Most iterations of the k-means that the alternation starts from."""


class QCNN(BlockQuantizer[QCNNConfig]):
    """Quantizes one layer after the other on the inputs it has by then (Wu et al. 2016, eq. 6 and 11)."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which layers are quantized, in the order in which the data reaches them."""
        weights, skipped = layer_weights(model, self.config)
        layers = []
        for weight, obstacle in self._calibration(task).order(model, weights):
            reason = obstacle or uneven(weight, self.config.length) or self.obstacle(model, weight)
            if reason is None:
                layers.append(LayerReport(name=weight.name, kind=weight.kind, action=self.action(weight)))
            else:
                skipped.append(SkippedLayer(name=weight.name, kind=weight.kind, reason=reason))
        return Analysis(tuple(layers), tuple(skipped), [layer.name for layer in layers])

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Quantize the planned layers and parametrize them by their codebooks."""
        original = copy.deepcopy(model) if self.config.correct else None
        found: dict[str, VectorCoded] = {}

        def solve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            rows = as_rows(layer).to(hessian.value)
            if original is not None:
                cross = self._cross(original, model, name, task, hessian.value)
                rows = refitted(rows, cross, hessian, self.config.damping)
            coded = self.solve(rows, hessian.damped(self.config.damping), derive(self.seed, name))
            found[name] = VectorCoded(coded.codes, coded.codebook.to(layer.weight.dtype), layer.weight.shape)
            return found[name].decode().view_as(rows).to(rows)

        errors = solve_layers_(model, analysis.plan, self._calibration(task), solve, description="quantizing")
        if errors:
            self.notes.append(worst_error(errors))
        for name, coded in found.items():
            share_(model, f"{name}.weight", coded)
        return model

    def solve(self, rows: torch.Tensor, hessian: torch.Tensor, seed: int) -> VectorCoded:
        """Return rows, (groups, rows, columns), quantized for a Hessian, beginning with product quantization."""
        edges = self.edges(rows.shape[-1])
        start = cluster_blocks(rows.flatten(0, 1), self.config.length, edges, self.config.codes, _CLUSTERING, seed)
        codes = start.codes.long().view(*rows.shape[:2], -1)
        responses = Responses(rows, hessian, codes, start.codebook, edges)
        responses.fit(self.config.rounds)
        return VectorCoded(responses.codes.flatten().int(), responses.codebook, rows.shape)

    def _calibration(self, task: Task) -> LayerCalibration:
        config = self.config
        return LayerCalibration(task, config.batches, config.batch_size, config.max_inputs, torch.float64)

    def _cross(
        self, original: nn.Module, model: nn.Module, name: str, task: Task, hessian: torch.Tensor
    ) -> torch.Tensor:
        """Return 2/N sum x x'^T of a layer's inputs x in the original and x' in the model, of the shape of its H."""
        config, cross, seen = self.config, torch.zeros_like(hessian), 0
        for user in holders(model, model.get_submodule(name).weight):
            batches = task.calibration(config.batch_size, config.batches)
            calls = stream_together((original, model), batches, user, f"calibrating {name}", config.batches)
            seen_by = partial(vectors, model.get_submodule(user))
            for (before, _), (now, _) in calls:
                for x, new in zip(seen_by(before.to(cross)), seen_by(now.to(cross)), strict=True):
                    seen += x.shape[1]
                    cross.baddbmm_(x.mT, new, beta=1 - x.shape[1] / seen, alpha=2 / seen)
        return cross
