"""Cutting units that no longer carry anything, without a change of the outputs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rarefy.dependencies import Dependencies, Group, Member, Removal, cut, find_dependencies, same_outputs
from rarefy.measure.mode import evaluation
from torch import nn

from rarefy_pruning.sparsity.constants import Signal, absorb_, pads_with_zeros, signals
from rarefy_pruning.sparsity.members import Layers, layer_name
from rarefy_pruning.sparsity.slices import Slices, Structures, squared_norms


@dataclass(frozen=True)
class Removed:
    """A model without its dead units."""

    model: nn.Module
    units: Mapping[str, int]
    """Units there were by group."""
    died: Mapping[str, int]
    """Dead units by group."""
    cut: Mapping[str, int]
    """Units cut by group; fewer where all died, or where the outputs would change."""


def remove_dead(
    model: nn.Module, inputs: tuple[Any, ...], dependencies: Dependencies, names: Collection[str]
) -> Removed:
    """Cut the dead units of the groups called `names`; at least one stays in each.

    A unit is dead when nobody reads it, or when it carries a constant: all weights that read it are zero, or all that
    make it are. Scales and biases on its way then make the constant, which goes into the biases of its readers. Where
    that cannot be exact, the unit stays. Weights that only make units which nobody reads do not count as
    reading, so that what feeds them is dead too.
    """
    groups = [dependencies[name] for name in names]
    silenced = copy.deepcopy(model)
    _silence_(silenced, groups)
    layers = Layers.of(silenced)
    dead = {group.name: _dead(silenced, group, layers) for group in groups}
    found = signals(silenced, inputs, readers(groups, layers))
    removal: dict[str, torch.Tensor] = {}
    for group in groups:
        gone = dead[group.name] & absorbable(group, layers, found)
        if gone.all():
            gone[0] = False
        if gone.any():
            removal[group.name] = gone.nonzero().flatten()
    compact = cut_constant(silenced, inputs, dependencies, removal, found) if removal else model
    if not same_outputs(_outputs(compact, inputs), _outputs(model, inputs)):
        # something reads a unit without a weight, as a product of two activations does
        compact, removal = model, {}
    return Removed(
        compact,
        {group.name: group.units for group in groups},
        {name: int(units.sum()) for name, units in dead.items()},
        {name: len(removal.get(name, ())) for name in names},
    )


def cut_constant(
    model: nn.Module,
    inputs: tuple[Any, ...],
    dependencies: Dependencies,
    removal: Removal,
    found: Mapping[str, Signal],
) -> nn.Module:
    """Return a copy of `model` without the units of `removal`, their means absorbed by the layers that read them."""
    if not removal:
        return model
    model, layers = copy.deepcopy(model), Layers.of(model)
    positions: dict[str, list[torch.Tensor]] = {}
    for name, units in removal.items():
        for member in dependencies[name].members:
            if layers.reads(member):
                positions.setdefault(layer_name(member), []).append(member.indices[units].flatten())
    if absorb_(model, found, {name: torch.cat(parts) for name, parts in positions.items()}):
        # a new bias is one more member of its group
        dependencies = find_dependencies(model, inputs)
    return cut(model, dependencies, removal)


def readers(groups: Iterable[Group], layers: Layers) -> set[str]:
    """Return the names of the layers that read units of the groups."""
    return {layer_name(member) for group in groups for member in group.members if layers.reads(member)}


def _dead(model: nn.Module, group: Group, layers: Layers) -> torch.Tensor:
    """Tell which units are dead, `(units,)`."""
    roles = _Roles.of(model, group, layers)
    parameters = dict(model.named_parameters())
    makers = [*roles.making, *roles.others]
    silent = _zero(parameters, makers) if makers else torch.tensor(False)
    return (silent | _unread(parameters, roles)).expand(group.units).clone()


@torch.no_grad()
def _silence_(model: nn.Module, groups: Sequence[Group]) -> None:
    """Zero the weights that make units which nobody reads, and so what is read for them only, layer after layer."""
    layers, parameters = Layers.of(model), dict(model.named_parameters())
    roles = [_Roles.of(model, group, layers) for group in groups]
    changed = True
    while changed:
        changed = False
        for role in roles:
            unread = _unread(parameters, role)
            for member in role.making if unread.any() else ():
                weight, places = parameters[member.tensor], member.indices[unread.expand(len(member.indices))].flatten()
                changed = changed or bool(weight[places].any())
                weight[places] = 0


@dataclass(frozen=True)
class _Roles:
    """The weights among the members of a group, by what they do with its units."""

    reading: Sequence[Member]
    making: Sequence[Member]
    others: Sequence[Member]
    """The embedding of a position, say: whether it makes or reads is not known."""

    @classmethod
    def of(cls, model: nn.Module, group: Group, layers: Layers) -> _Roles:
        """Tell them apart."""
        parameters = dict(model.named_parameters())
        weights = [m for m in group.members if m.tensor in parameters and parameters[m.tensor].dim() > 1]
        reading, making = ([m for m in weights if does(m)] for does in (layers.reads, layers.produces))
        return cls(reading, making, [m for m in weights if not layers.reads(m) and not layers.produces(m)])


def _unread(parameters: Mapping[str, torch.Tensor], roles: _Roles) -> torch.Tensor:
    """Tell which units nobody reads, `(units,)` or for all of them."""
    return _zero(parameters, [*roles.reading, *roles.others]) if roles.reading else torch.tensor(False)


def _zero(parameters: Mapping[str, torch.Tensor], members: Sequence[Member]) -> torch.Tensor:
    """Tell which units are zero in all `members`."""
    used = Structures("", tuple(Slices(m.tensor, (m.dim,), m.indices) for m in members))
    counts = squared_norms(used, {m.tensor: (parameters[m.tensor] != 0).float() for m in members})
    return (counts == 0).cpu()


def absorbable(group: Group, layers: Layers, found: Mapping[str, Signal]) -> torch.Tensor:
    """Tell for which units the readers can take what they read of it into their biases exactly, `(units,)`."""
    fine = torch.ones(group.units, dtype=torch.bool)
    for member in group.members:
        if layers.reads(member):
            layer, signal = layers.by_weight[member.tensor], found[layer_name(member)]
            inside = signal.mean == 0 if pads_with_zeros(layer) else torch.ones_like(signal.constant)
            taken = (signal.constant & inside).cpu()[member.indices].all(1)
            fine &= taken | _zero({member.tensor: layer.weight}, [member])
        elif layers.reads_in_groups(member):
            fine &= _zero({member.tensor: layers.by_weight[member.tensor].weight}, [member])
    return fine


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad(), evaluation(model):
        return model(*inputs)
