"""The neurons of a layer: the weights they read by and those by which they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rarefy.dependencies.groups import Group, Member
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rarefy_pruning.sharing.merging import Merge, merge_outgoing_

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Neurons:
    """Where the weights of a group's units stand: units of one layer, perhaps normalized, read by others."""

    layer: str
    """Name of the layer that makes them."""
    rows: torch.Tensor
    """The row of each unit in that layer's weight, `(units,)`."""
    norm: str | None
    """Name of the batch normalization between, folded into the comparison."""
    norm_rows: torch.Tensor | None
    """The place of each unit in it, `(units,)`."""
    readers: tuple[Member, ...]
    """The weights that read them, along dimension 1."""


def neurons_of(model: nn.Module, group: Group, layer: str) -> Neurons | str:
    """Return the neurons of `layer` that are the units of `group`, or why they cannot be merged."""
    rows: dict[str, torch.Tensor] = {}
    norms: dict[str, torch.Tensor] = {}
    readers = []
    if why := _why_not(group):
        return why
    for member in group.members:
        name, _, leaf = member.tensor.rpartition(".")
        module = model.get_submodule(name)
        dense = isinstance(module, _LAYERS) and getattr(module, "groups", 1) == 1
        if dense and member.dim == 0 and leaf in ("weight", "bias"):
            rows[name] = member.indices
        elif dense and member.dim == 1 and leaf == "weight":
            readers.append(member)
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            norms[name] = member.indices
        else:
            return f"{member.tensor!r} of a {type(module).__name__} depends on them too, and it cannot be merged"
    if len(rows) > 1:
        others = sorted(rows.keys() - {layer})
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f"they are added to or multiplied with those of {', '.join(others[:3])}{more}"
    if len(norms) > 1:
        return f"they are normalized more than once, by {', '.join(norms)}"
    if not readers:
        return "no layer reads them"
    if any(indices.shape[1] != 1 for indices in (*rows.values(), *norms.values())):
        return "each of them is several rows of the weight"
    norm = next(iter(norms), None)
    return Neurons(layer, rows[layer][:, 0], norm, None if norm is None else norms[norm][:, 0], tuple(readers))


def _why_not(group: Group) -> str | None:
    if group.pinned is not None:
        return group.pinned
    if group.kind != "channel":
        return f"they can only be cut by whole {group.kind}s"
    if group.overlaps:
        return "other layers divide them in another way"
    if group.changes_statistics:
        return "a mean or a variance is taken over them"
    return "it has one neuron" if group.units == 1 else None


def incoming(model: nn.Module, neurons: Neurons) -> torch.Tensor:
    """Return the weights of each unit with its bias as last coordinate, `(units, in + 1)`, float64.

    A normalization is folded in as it works in evaluation: scale and shift by its running statistics.
    """
    layer, rows = model.get_submodule(neurons.layer), neurons.rows
    weight = layer.weight.detach().double()[rows].flatten(1)
    bias = weight.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach().double()[rows]
    if neurons.norm is not None:
        scale, shift = affine(model.get_submodule(neurons.norm), neurons.norm_rows)
        weight, bias = weight * scale.unsqueeze(1), bias * scale + shift
    return torch.cat((weight, bias.unsqueeze(1)), 1)


def affine(norm: nn.Module, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and the shift of a batch normalization in evaluation, float64."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale[rows], shift[rows]


def outgoing(model: nn.Module, neurons: Neurons) -> torch.Tensor:
    """Return the weights by which the units are read, `(rows, units)`, float64.

    A unit that a linear layer reads in several places (after flattening) or a convolution at several taps has as many
    rows per output.
    """
    return torch.cat([read(model.get_parameter(m.tensor), m.indices).flatten(0, -2) for m in neurons.readers])


def read(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the columns `indices`, `(units, k)`, of a weight `(out, in, ...)` as `(out, k, taps, units)`, float64."""
    columns = weight.detach().double().flatten(2) if weight.dim() > 2 else weight.detach().double().unsqueeze(2)
    return columns[:, indices].permute(0, 2, 3, 1)


def merge_columns_(weight: torch.Tensor, indices: torch.Tensor, merges: Sequence[Merge]) -> None:
    """Merge the columns of the units in a weight that reads them, without gradient."""
    columns = read(weight, indices)
    merge_outgoing_(columns, merges)
    shape = (len(weight), *indices.shape, *weight.shape[2:])
    weight.detach()[:, indices] = columns.permute(0, 3, 1, 2).reshape(shape).to(weight.dtype)
