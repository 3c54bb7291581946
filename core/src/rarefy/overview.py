"""A model at a glance: its layers, what they hold and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rarefy.measure import flops_by_module


@dataclass(frozen=True)
class LayerRow:
    """One layer that holds parameters of its own."""

    name: str
    kind: str
    parameters: int
    share: float
    """Share of the model's parameters."""
    sparsity: float
    """Share of the parameters that are exactly zero."""
    flops: int | None
    """FLOPs (2 x MACs) of a forward pass at batch size 1; None without example inputs."""


def layers(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> list[LayerRow]:
    """Return the layers with parameters, in order; a tensor shared by several layers counts for the first."""
    work = flops_by_module(model, inputs) if inputs is not None else {}
    total = max(1, sum(parameter.numel() for parameter in model.parameters()))
    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        size = sum(p.numel() for p in own)
        if size:
            zeros = sum(int((p == 0).sum()) for p in own)
            flops = work.get(name, 0) if inputs is not None else None
            rows.append(LayerRow(name or "(root)", type(module).__name__, size, size / total, zeros / size, flops))
    return rows
