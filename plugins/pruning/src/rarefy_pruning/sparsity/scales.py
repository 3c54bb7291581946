"""The batch norm scales of a group, and whether they can silence its units."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from rarefy.dependencies import Dependencies, Group, Member
from torch import nn

from rarefy_pruning.sparsity.constants import signals, zeroed
from rarefy_pruning.sparsity.members import Layers, layer_name, refusal
from rarefy_pruning.sparsity.removal import readers

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def scales(model: nn.Module, group: Group) -> list[Member]:
    """Return the members of a group that are scales of batch norms."""
    parameters = dict(model.named_parameters())
    return [
        member
        for member in group.members
        if member.tensor in parameters
        and member.tensor.endswith(".weight")
        and isinstance(model.get_submodule(layer_name(member)), NORMS)
    ]


def refusals(
    model: nn.Module, inputs: tuple[Any, ...], dependencies: Dependencies, targets: Collection[str]
) -> dict[str, str]:
    """Return why the units of groups cannot be judged by the scales of the batch norms `targets`, by group."""
    trial, found = copy.deepcopy(model), {}
    for group in (*dependencies.groups, *dependencies.pinned):
        norms = scales(model, group)
        others = [layer_name(member) for member in norms if layer_name(member) not in targets]
        if not norms:
            reason: str | None = "no batch norm scales its units"
        elif others:
            reason = f"its channels are coupled with those of {others[0]!r}, which is no target"
        else:
            reason = refusal(group) or _unsilenced(trial, inputs, group)
        if reason is not None:
            found[group.name] = reason
    return found


def _unsilenced(model: nn.Module, inputs: tuple[Any, ...], group: Group) -> str | None:
    """Return why the units still carry something when all their scales are zero, or None when they do not."""
    layers = Layers.of(model)
    with zeroed(*(model.get_parameter(member.tensor) for member in scales(model, group))):
        found = signals(model, inputs, readers([group], layers))
    for member in group.members:
        if layers.reads(member) and not found[layer_name(member)].fixed.cpu()[member.indices].all():
            return f"with all its scales at zero, {layer_name(member)!r} still reads its channels"
    return None
