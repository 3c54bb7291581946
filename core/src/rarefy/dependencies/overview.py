"""The groups of a model at a glance: what they hold, what cutting them saves, and what it does to the loss."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rarefy.dependencies.checking import find_dependencies
from rarefy.dependencies.cutting import cut, mask
from rarefy.dependencies.groups import Dependencies, Group, tensors
from rarefy.measure import flops
from rarefy.measure.mode import device_of, move
from rarefy.modules.skeleton import meta_copy
from rarefy.progress import track
from rarefy.sensitivity import Increase
from rarefy.task import Task

LEVELS = (0.25, 0.5, 0.75)
"""Shares of a group's units that are masked to see how sensitive the model is to it."""


@dataclass(frozen=True)
class GroupRow:
    """One group of units that go together."""

    name: str
    kind: str
    units: int
    members: tuple[str, ...]
    """The tensors it cuts, each with the dimension: `conv1.weight[0]`."""
    parameters: int
    """Parameters in the slices of all its units."""
    flops_saved: float | None
    """Share of the model's FLOPs that is saved when half of the units go; None when it is pinned."""
    changes_statistics: bool
    """Whether a mean, a variance or a scale is taken over the units."""
    pinned: str | None
    """Why it may not be cut."""
    increases: tuple[float, ...] = ()
    """Increase of the loss when the 25, 50 and 75 % of the units with the smallest norm are masked; without labels
    it is how far the outputs move."""


def group_rows(model: nn.Module, task: Task, *, sensitivity: bool = False) -> list[GroupRow]:
    """Return a row per group of `model`, the pinned ones last; with `sensitivity`, each is masked and the loss taken.

    Raises `StageError` when the model does not run on the task's example inputs.
    """
    inputs = move(task.example_inputs(1), device_of(model))
    found = find_dependencies(model, inputs)
    meta = meta_copy(model)
    whole = max(1, flops(meta, inputs))
    increase = Increase(model, task) if sensitivity else None
    rows = []
    for group in track([*found.groups, *found.pinned], "looking at groups"):
        saved: float | None = None
        increases: tuple[float, ...] = ()
        if group.pinned is None:
            half = torch.arange(group.units // 2)
            saved = 1 - flops(cut(meta, found, {group.name: half}), inputs) / whole
            increases = _increases(model, found, group, increase) if increase is not None else ()
        rows.append(_row(model, group, saved, increases))
    return rows


def _row(model: nn.Module, group: Group, saved: float | None, increases: tuple[float, ...]) -> GroupRow:
    return GroupRow(
        name=group.name,
        kind=group.kind,
        units=group.units,
        members=tuple(f"{member.tensor}[{member.dim}]" for member in group.members),
        parameters=_parameters(model, group),
        flops_saved=saved,
        changes_statistics=group.changes_statistics,
        pinned=group.pinned,
        increases=increases,
    )


def _parameters(model: nn.Module, group: Group) -> int:
    """Count the parameters in the slices of the units; where two dimensions of a tensor are cut, each once."""
    found, left = dict(model.named_parameters()), defaultdict[str, dict[int, int]](dict)
    for member in group.members:
        if member.tensor in found:
            rest = found[member.tensor].shape[member.dim] - len(torch.unique(member.indices))
            left[member.tensor][member.dim] = rest
    return sum(
        found[name].numel() - math.prod(dims.get(d, size) for d, size in enumerate(found[name].shape))
        for name, dims in left.items()
    )


def _increases(model: nn.Module, found: Dependencies, group: Group, increase: Increase) -> tuple[float, ...]:
    order = _norms(model, group).argsort(stable=True)
    return tuple(increase(mask(model, found, {group.name: order[: round(level * group.units)]})) for level in LEVELS)


def _norms(model: nn.Module, group: Group) -> torch.Tensor:
    """Return the Euclidean norm of all weights that belong to each unit, `(units,)`, on the CPU."""
    known: dict[str, Any] = tensors(model)
    squares = torch.zeros(group.units)
    for member in group.members:
        tensor = known[member.tensor].detach()
        if tensor.dim() > 1 and tensor.is_floating_point():
            rows = tensor.float().square().movedim(member.dim, 0).flatten(1).sum(1).cpu()
            squares += rows[member.indices.cpu()].sum(1)
    return squares.sqrt()
