"""What the members of a dependency group are to the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rarefy.dependencies import Dependencies, Group, Member
from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layers:
    """The linear and convolution layers of a model by the name of their weight, each tensor under its first name."""

    by_weight: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Find them."""
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
        return cls({n: m for n, m in owners.items() if n.rpartition(".")[2] == "weight" and isinstance(m, LAYERS)})

    def produces(self, member: Member) -> bool:
        """Tell whether the member holds the outputs of a layer."""
        return member.tensor in self.by_weight and member.dim == 0

    def reads(self, member: Member) -> bool:
        """Tell whether the member holds the input channels of a layer, one position for each."""
        return member.tensor in self.by_weight and member.dim == 1 and not self.reads_in_groups(member)

    def reads_in_groups(self, member: Member) -> bool:
        """Tell whether the member holds the inputs of a grouped convolution, one position for a channel per group."""
        return getattr(self.by_weight.get(member.tensor), "groups", 1) > 1 and member.dim == 1


def layer_name(member: Member) -> str:
    """Return the name of the layer that has the tensor."""
    return member.tensor.rpartition(".")[0]


def groups_of(dependencies: Dependencies, weight: str, dim: int) -> list[Group]:
    """Return the groups, pinned ones too, that cut `weight` along `dim`."""
    every = (*dependencies.groups, *dependencies.pinned)
    return [group for group in every if any(m.tensor == weight and m.dim == dim for m in group.members)]


def refusal(group: Group) -> str | None:
    """Return why no unit of `group` can die and be cut without a trace, or None."""
    if group.pinned is not None:
        return group.pinned
    if group.changes_statistics:
        return f"a mean or a variance is taken over the units of {group.name!r}, so that a cut changes all of them"
    if group.kind == "position" and group.overlaps:
        return f"the units of {group.name!r} are equal places in several blocks; whole blocks can be cut instead"
    return None
