"""How many numbers a model holds."""

from __future__ import annotations

from torch import nn


def parameters(model: nn.Module) -> int:
    """Count the parameters; a tied tensor counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def nonzero(model: nn.Module) -> int:
    """Count the parameters that are not exactly zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def layer_parameters(model: nn.Module) -> dict[str, int]:
    """Return the non-zero parameters of each layer by name; a tied tensor counts for the first of its layers."""
    seen: set[nn.Parameter] = set()
    counts = {}
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in seen]
        seen.update(own)
        if own:
            counts[name or "(root)"] = sum(int(parameter.count_nonzero()) for parameter in own)
    return counts
