"""What all weight-sharing techniques have in common: layers, zeros, fine-tuning of the codebooks. A quantizer adds how
one tensor becomes codes and a codebook."""

from __future__ import annotations

from typing import TypeVar

import torch
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite
from rarefy.weights import LayerWeight, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.codes import Coded, Shared, share_
from rarefy_quantization.config import WeightSharing
from rarefy_quantization.parametrizations import make_plain_

ConfigT = TypeVar("ConfigT", bound=WeightSharing)


class TensorQuantizer(Technique[ConfigT]):
    """Gives each target layer codes and a codebook; write `quantize`.

    Weights that are exactly zero are not quantized: they get code 0 with the value 0, which takes one of the codes,
    and stay zero while the codebook is fine-tuned.
    """

    def quantize(
        self, values: torch.Tensor, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and codebook of `values`, (n,), with n > `count`; the codebook has at most `count` entries."""
        raise NotImplementedError

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Quantize every target layer and say with what error."""
        weights, skipped = layer_weights(model, self.config)
        bits = per_layer([w.name for w in weights] + [s.name for s in skipped], self.config.per_layer, self.config.bits)
        layers, plan = [], {}
        for name, kind, tensor, width in self._tensors(weights, bits):
            alive = int(tensor.count_nonzero())
            if alive <= 2**width:
                reason = f"it has {alive:,} weights that are not zero, and {width} bits make {2**width} codes"
                skipped.append(SkippedLayer(name=name.removesuffix(".weight"), kind=kind, reason=reason))
                continue
            plan[name] = self.code(tensor, width, derive(self.seed, name))
            layers.append(_report(name.removesuffix(".weight"), kind, tensor, plan[name], width))
        return Analysis(tuple(layers), tuple(skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Parametrize the layers by their codebooks."""
        for name, coded in analysis.plan.items():
            share_(model, name, coded)
        return model

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave plain weights that take the values of the fine-tuned codebooks."""
        make_plain_(model, Shared)
        return model

    @torch.no_grad()
    def code(self, tensor: torch.Tensor, bits: int, seed: int) -> Coded:
        """Return `tensor` quantized to at most 2^bits values, zero included where it occurs."""
        alive = tensor != 0
        zeros = not bool(alive.all())
        generator = torch.Generator().manual_seed(seed)
        found, codebook = self.quantize(tensor[alive], 2**bits - zeros, generator)
        codes = torch.zeros(tensor.shape, dtype=torch.uint8, device=tensor.device)
        codes[alive] = (found + int(zeros)).to(torch.uint8)
        return Coded(codes, torch.nn.functional.pad(codebook, (1, 0)) if zeros else codebook, zeros)

    def _tensors(self, weights: list[LayerWeight], bits: dict[str, int]) -> list[tuple[str, str, torch.Tensor, int]]:
        """Return name, kind, values and bits of each tensor to quantize."""
        found = {}
        for weight in weights:
            found[weight.parameter] = (f"{weight.name}.weight", weight.kind, bits[weight.name])
            bias = weight.layer.bias
            if self.config.biases and isinstance(bias, nn.Parameter) and bias not in found:
                refuse_not_finite(weight.name, bias)
                found[bias] = (f"{weight.name}.bias", "bias", bits[weight.name])
        return [(name, kind, parameter.detach(), width) for parameter, (name, kind, width) in found.items()]


def _report(name: str, kind: str, tensor: torch.Tensor, coded: Coded, bits: int) -> LayerReport:
    exact = tensor.double()
    error = (coded.decode().double() - exact).square().sum() / exact.square().sum()
    distinct = coded.codebook.numel()
    return LayerReport(
        name=name,
        kind=kind,
        action=f"{distinct} shared values, {bits} bits",
        scores={
            "distinct": distinct,
            "bits": bits,
            "relative_mse": float(error),
            "entropy": coded.entropy(),
        },
    )
