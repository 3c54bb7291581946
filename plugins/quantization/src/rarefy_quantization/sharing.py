"""What all weight-sharing techniques have in common: layers, zeros, fine-tuning of the codebooks. A quantizer adds how
one tensor becomes codes and a codebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from rarefy.curvature import second_derivatives
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite
from rarefy.weights import LayerWeight, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer, TechniqueConfig
from torch import nn

from rarefy_quantization.codes import Coded, Lookup, share_
from rarefy_quantization.config import WeightSharing
from rarefy_quantization.parametrizations import make_plain_

_FLOOR = 0.3
"""Chosen on digits_cnn: at 0.001 the loss of 1.5 bits per weight was thirteen times as high, at 0.03 four times."""
AnyConfigT = TypeVar("AnyConfigT", bound=TechniqueConfig)
ConfigT = TypeVar("ConfigT", bound=WeightSharing)


class CodebookTechnique(Technique[AnyConfigT]):
    """Trains what codes are looked up in; the plan of `analyze` is what each tensor becomes, by its name."""

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Parametrize the layers by their codebooks."""
        for name, coded in analysis.plan.items():
            share_(model, name, coded)
        return model

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave plain weights that take the values of the fine-tuned codebooks."""
        make_plain_(model, Lookup)
        return model


class TensorQuantizer(CodebookTechnique[ConfigT]):
    """Gives each target layer codes and a codebook; write `quantize`.

    Weights that are exactly zero are not quantized: they get code 0 with the value 0, which takes one of the codes,
    and stay zero while the codebook is fine-tuned.
    """

    def quantize(
        self, values: torch.Tensor, importance: torch.Tensor | None, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and codebook of `values`, (n,), with n > `count`; the codebook has at most `count` entries.

        `importance`, (n,), weighs their squared errors, each above zero; None when all count the same.
        """
        raise NotImplementedError

    def prepare(self, tensors: Mapping[str, torch.Tensor], importances: Mapping[str, torch.Tensor]) -> None:
        """Look at all tensors together before they are quantized one by one."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Quantize every target layer and say with what error."""
        weights, skipped = layer_weights(model, self.config)
        bits = per_layer([w.name for w in weights] + [s.name for s in skipped], self.config.per_layer, self.config.bits)
        layers, plan = [], {}
        tensors = self._tensors(weights, bits)
        importances = self._importances(model, weights, task)
        self.prepare({name: tensor for name, _, tensor, _ in tensors}, importances)
        for name, kind, tensor, width in tensors:
            alive = int(tensor.count_nonzero())
            if alive <= 2**width:
                reason = f"it has {alive:,} weights that are not zero, and {width} bits make {2**width} codes"
                skipped.append(SkippedLayer(name=name.removesuffix(".weight"), kind=kind, reason=reason))
                continue
            plan[name] = self.code(tensor, width, derive(self.seed, name), importances.get(name))
            layers.append(_report(name.removesuffix(".weight"), kind, tensor, plan[name], width))
        return Analysis(tuple(layers), tuple(skipped), plan)

    @torch.no_grad()
    def code(self, tensor: torch.Tensor, bits: int, seed: int, importance: torch.Tensor | None = None) -> Coded:
        """Return `tensor` quantized to at most 2^bits values, zero included where it occurs."""
        alive = tensor != 0
        zeros = not bool(alive.all())
        generator = torch.Generator().manual_seed(seed)
        weighed = None if importance is None else importance[alive]
        found, codebook = self.quantize(tensor[alive], weighed, 2**bits - zeros, generator)
        codes = torch.zeros(tensor.shape, dtype=torch.uint8, device=tensor.device)
        codes[alive] = (found + int(zeros)).to(torch.uint8)
        return Coded(codes, torch.nn.functional.pad(codebook, (1, 0)) if zeros else codebook, zeros)

    def _importances(self, model: nn.Module, weights: list[LayerWeight], task: Task) -> dict[str, torch.Tensor]:
        """Return the importance of each weight by the name of its tensor; that of a bias is not measured."""
        config = self.config
        if config.importance == "none":
            return {}
        found = second_derivatives(model, weights, task, config.batches, config.probes, self.seed)
        return {f"{name}.weight": _floored(curvature.double()) for name, curvature in found.items()}

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


def _floored(curvature: torch.Tensor) -> torch.Tensor:
    """Return second derivatives that are no less than a share of their mean.

    They are estimates for small changes; where they say that a weight does not matter, a large change of it does.
    """
    return curvature.clamp(min=(_FLOOR * curvature.clamp(min=0).mean()).clamp(min=1e-30))


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
