"""Fewer significant bits for what stays in floating point."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rarefy.artifact.bits import name_of, to_bits
from rarefy.artifact.floats import ITEMSIZES, widened
from rarefy.artifact.grids import candidates
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite, select
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.rounding.config import PrecisionConfig


class Precision(Technique[PrecisionConfig]):
    """Rounds every floating-point tensor of the target layers, buffers included, to the nearest."""

    @torch.no_grad()
    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which tensors of which layers are rounded, with what error."""
        layers, skipped, plan = [], [], {}
        for name, layer in select(model, self.config):
            kind, tensors = type(layer).__name__, dict(floats(layer))
            for tensor in tensors.values():
                refuse_not_finite(name, tensor)
            chosen = [own for own, tensor in tensors.items() if not on_steps(tensor)]
            if not chosen:
                reason = "it has no floats but multiples of steps" if tensors else "it has no floating-point tensors"
                skipped.append(SkippedLayer(name=name, kind=kind, reason=reason))
                continue
            both = [(rounded(tensors[own], self.config.bits).double(), tensors[own].double()) for own in chosen]
            error = sum(float((after - before).square().sum()) for after, before in both)
            size = sum(float(before.square().sum()) for _, before in both)
            scores = {"bits": self.config.bits, "relative_mse": error / max(size, 1e-300)}
            action = f"{self.config.bits} significant bits: {', '.join(chosen)}"
            layers.append(LayerReport(name=name, kind=kind, action=action, scores=scores))
            plan[name] = chosen
        return Analysis(tuple(layers), tuple(skipped), plan)

    @torch.no_grad()
    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Round."""
        for name, chosen in analysis.plan.items():
            tensors = dict(floats(model.get_submodule(name)))
            for own in chosen:
                tensors[own].copy_(rounded(tensors[own], self.config.bits))
        return model


def floats(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating-point parameters and buffers that are a layer's own."""
    for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if tensor.is_floating_point() and tensor.numel():
            yield name, tensor


def rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest numbers with so many significant bits, halves to even."""
    fraction, exponent = torch.frexp(tensor.double())
    return torch.ldexp((fraction * 2**bits).round(), exponent - bits).to(tensor.dtype)


def on_steps(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is made of small multiples of a few steps, which a file can hold as integers."""
    dtype, width = name_of(tensor, "a tensor"), tensor[0].numel() if tensor.dim() > 1 else 1
    if dtype not in ITEMSIZES or width < 2:
        return False
    return next(candidates(widened(to_bits(tensor), dtype), width), None) is not None
