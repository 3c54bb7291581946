"""Batch normalization taken into the layer before it, where that leaves a model's outputs as they are."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy.dependencies import same_outputs
from rarefy.hessian import LAYERS
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.technique import replace_
from rarefy.weights import holders

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to their largest value."""


def fold_batch_norms(
    model: nn.Module, inputs: tuple[Any, ...], among: Container[str] | None = None
) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy of `model` without the batch norms that follow a layer, and their names by that of the layer.

    In evaluation mode (w * x + b - mean) * scale + shift, with scale = weight / sqrt(var + eps), is one layer: w is
    multiplied by scale, and (b - mean) * scale + shift becomes the bias. A run on `inputs`, positional arguments of the
    model, tells which norm is given what which layer gave. Those that cannot be folded without changing the outputs on
    `inputs`, as others use what the layer gives, stay; so do those of layers with a shared or computed weight, and of
    layers that are not `among` those named.
    """
    wanted = outputs_of(model, inputs)
    pairs = {name: norm for name, norm in _pairs(model, inputs).items() if among is None or name in among}
    folded = _folded(model, pairs.items())
    if _gives(folded, inputs, wanted):
        return folded, pairs
    folded, kept = model, {}
    for layer, norm in pairs.items():
        trial = _folded(folded, [(layer, norm)])
        if _gives(trial, inputs, wanted):
            folded, kept[layer] = trial, norm
    return folded if kept else copy.deepcopy(model), kept


def outputs_of(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return what a model gives in evaluation mode."""
    with evaluation(model), torch.no_grad():
        return model(*move(inputs, device_of(model)))


def _gives(model: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> bool:
    try:
        return same_outputs(outputs_of(model, inputs), wanted, TOLERANCE)
    except Exception:  # the model's own code may read an attribute of a norm
        return False


def _pairs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Return the norms that are given the very tensor that a layer gave, by the name of the layer."""
    given: list[tuple[str, torch.Tensor]] = []
    pairs: list[tuple[str, str]] = []
    handles = []

    def leave(name: str) -> Any:
        return lambda module, args, out: given.append((name, out))

    def enter(norm: str) -> Any:
        return lambda module, args: pairs.extend((name, norm) for name, out in given if args and args[0] is out)

    for name, module in model.named_modules():
        if _has_own_weight(model, module):
            handles.append(module.register_forward_hook(leave(name)))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(enter(name)))
    try:
        outputs_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    layers, norms = ([pair[side] for pair in pairs] for side in (0, 1))
    return {layer: norm for layer, norm in pairs if layers.count(layer) == norms.count(norm) == 1}


def _has_own_weight(model: nn.Module, module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return isinstance(module, LAYERS) and weight is not None and len(holders(model, weight)) == 1


@torch.no_grad()
def _folded(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    result = copy.deepcopy(model)
    for name, norm_name in pairs:
        layer, norm = result.get_submodule(name), result.get_submodule(norm_name)
        _take_in_(layer, norm)
        stand_in = nn.Identity()
        stand_in.train(norm.training)
        replace_(result, norm, stand_in)
    return result


def _take_in_(layer: Any, norm: Any) -> None:
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    scale = (1.0 if norm.weight is None else norm.weight.double()) / deviation
    shift = 0.0 if norm.bias is None else norm.bias.double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    weight = layer.weight
    weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    moved = ((bias - norm.running_mean.double()) * scale + shift).to(weight.dtype)
    layer.bias = nn.Parameter(moved, requires_grad=weight.requires_grad)
