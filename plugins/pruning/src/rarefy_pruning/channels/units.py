"""The weights that belong to the units of a dependency group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rarefy.dependencies import Group, Member
from torch import nn


@dataclass(frozen=True, eq=False)
class Units:
    """A group together with the tensors of its model."""

    group: Group
    tensors: Mapping[str, torch.Tensor]
    owners: Mapping[str, nn.Module]
    """The module that has each tensor."""

    @property
    def makers(self) -> list[Member]:
        """The members that produce the units: filters, rows, embeddings."""
        return [m for m in self.group.members if self._matrix(m) and not m.reads]

    @property
    def readers(self) -> list[Member]:
        """The members that read the units."""
        return [m for m in self.group.members if self._matrix(m) and m.reads]

    @property
    def size(self) -> int:
        """Number of units."""
        return self.group.units

    def slices(self, member: Member, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """Return the entries of each unit in a member's tensor, or in one of its shape, `(units, entries)`."""
        values = (self.tensors[member.tensor] if tensor is None else tensor).detach()
        indices = member.indices.to(values.device)
        picked = values.movedim(member.dim, 0)[indices.flatten()]
        return picked.reshape(self.size, -1)

    def filters(self) -> torch.Tensor:
        """Return all entries by which a unit is produced, `(units, entries)`; those that read it when none does."""
        members = self.makers or self.readers
        if not members:
            members = [m for m in self.group.members if self.tensors[m.tensor].is_floating_point()]
        return torch.cat([self.slices(m).float() for m in members], 1)

    def _matrix(self, member: Member) -> bool:
        return isinstance(self.tensors[member.tensor], nn.Parameter) and self.tensors[member.tensor].dim() > 1


def units_of(model: nn.Module, groups: Sequence[Group]) -> list[Units]:
    """Return the groups with the tensors of `model`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in tensors}
    return [Units(group, tensors, owners) for group in groups]
