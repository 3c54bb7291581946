"""How the weights of a model are distributed."""

from __future__ import annotations

import numpy as np
import torch
from rarefy_schemas import Histogram
from torch import nn

LAYERS = 12


def histograms(model: nn.Module, bins: int = 40) -> list[Histogram]:
    """Return the distribution of the weights of the largest layers, in the model's order.

    Exact zeros are left out, so that what a pruned layer keeps can be seen; they are what is missing from the counts.
    """
    weights = _weights(model)
    largest = sorted(weights, key=lambda name: -weights[name].numel())[:LAYERS]
    return [_histogram(name, weight, bins) for name, weight in weights.items() if name in largest]


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() > 1:
            found[name or "(root)"] = weight.detach()
    return found


def _histogram(name: str, weight: torch.Tensor, bins: int) -> Histogram:
    values = weight.float().cpu().numpy()
    counts, edges = np.histogram(values[np.isfinite(values) & (values != 0)], bins)
    return Histogram(layer=name, edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
