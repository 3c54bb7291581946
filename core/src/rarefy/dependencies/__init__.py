"""Which slices of which tensors must be cut together, in any model that runs, and the cut itself."""

from rarefy.dependencies.checking import find_dependencies
from rarefy.dependencies.cutting import cut, mask
from rarefy.dependencies.groups import Dependencies, Group, Member, Removal
from rarefy.dependencies.trials import same_outputs

__all__ = ["Dependencies", "Group", "Member", "Removal", "cut", "find_dependencies", "mask", "same_outputs"]
