"""What must be cut together: groups of units, each with exact members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from rarefy.errors import StageError

Kind = Literal["channel", "block", "position"]


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one tensor that belong to the units of a group."""

    tensor: str
    """Name of the parameter or buffer."""
    dim: int
    """The dimension along which it is cut."""
    indices: torch.Tensor
    """Positions along `dim`, `(units, positions per unit)`, int64."""
    reads: bool = False
    """Whether the tensor is a weight that is summed over these positions: it reads the units."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind, such as the channels of a residual stream or the heads of an attention layer.

    A unit goes whole, with its slices of every member, or stays whole; the units of a group do not depend on each
    other.
    """

    name: str
    """The first tensor that produces the units, without `.weight`; unique in a model."""
    members: tuple[Member, ...]
    kind: Kind = "channel"
    """`block` for whole heads or convolution groups, `position` for equal places in each of them."""
    pinned: str | None = None
    """Why nothing of it may be cut; None when it may."""
    changes_statistics: bool = False
    """Whether a mean, a variance or a scale is taken over the units, so that removal differs from zeroing."""
    overlaps: bool = False
    """Whether another group cuts some of the same positions of a tensor another way."""

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.members[0].indices)


@dataclass(frozen=True, eq=False)
class Length:
    """A number in a module's attributes, such as `num_heads`, that is the length of an axis."""

    module: str
    attribute: str
    item: int | None
    """Its place where the attribute is a tuple or list."""
    before: int
    parts: tuple[tuple[str, torch.Tensor], ...]
    """For each group that shortens the axis: its name, and the positions of its units, `(units, positions)`."""

    def after(self, removal: Removal) -> int:
        """Return the length that is left."""
        gone = [positions[removal[name]].flatten() for name, positions in self.parts if name in removal]
        return self.before - (int((torch.unique(torch.cat(gone)) >= 0).sum()) if gone else 0)


@dataclass(frozen=True, eq=False)
class Dependencies:
    """The groups of a model."""

    groups: tuple[Group, ...]
    """What may be cut."""
    pinned: tuple[Group, ...] = ()
    """What may not, each with its reason."""
    lengths: tuple[Length, ...] = ()
    """Attributes of modules to correct after a cut."""
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    """The shape of each parameter and buffer of the model they were found in, by name."""

    def __getitem__(self, name: str) -> Group:
        """Return the group called `name`; raise `StageError` when there is none."""
        for group in (*self.groups, *self.pinned):
            if group.name == name:
                return group
        raise StageError(f"there is no group {name!r}; the groups are {', '.join(g.name for g in self.groups)}")


class Claims:
    """Positions of tensors that groups have taken, to tell which groups can be cut together."""

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], list[tuple[str, torch.Tensor]]] = defaultdict(list)

    def take(self, group: Group) -> tuple[str, str] | None:
        """Take the positions of a group; when another one has some of them, take none and return it and the tensor."""
        members = group.members if group.overlaps else ()
        wanted = [(member.tensor, member.dim, member.indices.flatten()) for member in members]
        for tensor, dim, positions in wanted:
            for other, taken in self._taken[tensor, dim]:
                if other != group.name and bool(torch.isin(positions, taken).any()):
                    return other, tensor
        for tensor, dim, positions in wanted:
            self._taken[tensor, dim].append((group.name, positions))
        return None


Removal = Mapping[str, torch.Tensor]
"""The units to remove, int64, by the name of their group."""


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, each tensor once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
