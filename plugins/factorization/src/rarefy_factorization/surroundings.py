"""What else in a model knows a layer that is to be replaced."""

from __future__ import annotations

from collections import Counter

from torch import nn


def tied_weights(model: nn.Module) -> frozenset[nn.Parameter]:
    """Return the parameters that more than one module uses, such as an embedding that is also the output layer."""
    users = Counter(parameter for module in model.modules() for parameter in module.parameters(recurse=False))
    return frozenset(parameter for parameter, count in users.items() if count > 1)


def leave_fast_path_(model: nn.Module) -> nn.Module:
    """Turn off the fused kernel of torch's encoder layers whose linear layers were replaced, and return the model.

    That kernel reads `linear1.weight` itself in evaluation mode. Without it the layers compute the same in steps.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _plain(module):
            module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not all(map(_plain, module.layers)):
            module.use_nested_tensor = False
    return model


def _plain(layer: nn.Module) -> bool:
    return all(isinstance(getattr(layer, name, None), nn.Linear) for name in ("linear1", "linear2"))
