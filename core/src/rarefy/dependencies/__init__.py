"""Which slices of which tensors must be cut together, in any model that runs, and the cut itself."""

from rarefy.dependencies.checking import find_dependencies
from rarefy.dependencies.cutting import cut, mask, removed
from rarefy.dependencies.groups import Claims, Dependencies, Group, Member, Removal
from rarefy.dependencies.trials import same_outputs

__all__ = [
    "Claims",
    "Dependencies",
    "Group",
    "Member",
    "Removal",
    "cut",
    "find_dependencies",
    "mask",
    "removed",
    "same_outputs",
]
