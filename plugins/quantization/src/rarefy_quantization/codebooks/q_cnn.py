"""Q-CNN: product codebooks that make the responses of each layer nearest to what they were."""

from __future__ import annotations

import copy

import torch
from rarefy.hessian import InputHessian, as_rows
from rarefy.layerwise import LayerCalibration, solve_layers_, worst_error
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis
from rarefy.weights import layer_weights
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
            if self.config.correct:
                rows = refitted(rows, hessian, self.config.damping)
            coded = self.solve(rows, hessian.damped(self.config.damping), derive(self.seed, name))
            found[name] = VectorCoded(coded.codes, coded.codebook.to(layer.weight.dtype), layer.weight.shape)
            return found[name].decode().view_as(rows).to(rows)

        calibration = self._calibration(task)
        errors = solve_layers_(model, analysis.plan, calibration, solve, description="quantizing", reference=original)
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
