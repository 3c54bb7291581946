"""From a model and example inputs to groups."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.dependencies.cutting import follows
from rarefy.dependencies.groups import Dependencies, Group, Kind, Length, Member, tensors
from rarefy.dependencies.labels import Ids
from rarefy.dependencies.operators.layers import KERNEL
from rarefy.dependencies.operators.reductions import STATISTICS
from rarefy.dependencies.tracing import Size, Trace, tracing
from rarefy.errors import StageError
from rarefy.modules.attention import opened
from rarefy.technique import replace_

Inputs = tuple[Any, ...]
Parts = tuple[tuple[str, torch.Tensor], ...]
# attributes of torch's own layers that nothing but the run tells when the layer has no tensors
_WITHOUT_TENSORS = frozenset(["num_features", "normalized_shape", "num_channels"])
_UNREACHED = "the example inputs do not reach it"


def observe(model: nn.Module, inputs: Inputs) -> Observation:
    """Run the model once and return what the run shows; `model` is not changed.

    Raises `StageError` when it does not run on the inputs.
    """
    twin = structure_copy(model).eval()
    for module in [m for m in twin.modules() if type(m) is nn.MultiheadAttention]:
        replace_(twin, module, opened(module))
    trace = Trace({id(tensor): name for name, tensor in tensors(model).items()})
    with torch.random.fork_rng(devices=[]), tracing(trace, twin):
        try:
            out = twin(*inputs)
        except Exception as error:
            raise StageError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}"
            ) from error
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            trace.algebra.pin(trace.fields(leaf), "it is part of the model's output")
    return Observation(trace, twin)


class Observation:
    """What a run showed, and what trials added to it."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.model = trace, model
        self.labels: dict[str, Ids] = {}
        """Labels of the units of each group."""
        self.sizes: dict[Length, Size] = {}

    def groups(self) -> Dependencies:
        """Return the groups by what is known now."""
        extraction = _Extraction(self.trace, self.model)
        found = extraction.dependencies()
        self.labels, self.sizes = extraction.labels, extraction.sizes
        return found

    def pin(self, group: str, reason: str) -> None:
        """Forbid the removal of a group's units."""
        self.trace.algebra.labels.pin(self.labels[group], reason)

    def tie(self, lengths: Sequence[Length]) -> None:
        """Make axes change together."""
        sizes = [self.sizes[length] for length in lengths]
        for size in sizes[1:]:
            self.trace.algebra.labels.unite_sets(list(sizes[0].labels), list(size.labels))


def structure_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules on the very same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors(model).values()})


class _Extraction:
    """Turns labels into groups."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.model = trace, model
        labels = trace.algebra.labels
        self.places = list(trace.atoms)
        self.reasons = labels.pinned()
        self.marks = {what: labels.marked(what) for what in (KERNEL, STATISTICS, "row", "place")}
        self.home: dict[int, tuple[str, int]] = {}
        """Group and number of each unit, by label."""
        self.labels: dict[str, Ids] = {}
        """Labels of the units of each group."""
        self.sizes: dict[Length, Size] = {}
        """Where each length was seen."""

    def dependencies(self) -> Dependencies:
        """Return groups with names, and the lengths that depend on them."""
        groups = self._named(self._groups())
        free = tuple(group for group in groups if group.pinned is None)
        return Dependencies(
            tuple(_with_overlap(free)),
            (*(group for group in groups if group.pinned is not None), *self._unreached()),
            tuple(self._lengths()),
        )

    def _groups(self) -> Iterator[tuple[Group, list[int]]]:
        """Yield groups without names, with the labels of their units."""
        signatures = defaultdict(list)
        for leaf, places in self._units().items():
            counts = tuple(sorted(Counter(place for place, _ in places).items()))
            kind = self._kind(leaf)
            key = (counts, self.reasons.get(leaf), leaf in self.marks[STATISTICS], kind)
            signatures[key].append((leaf, places))
        for (counts, reason, statistics, kind), units in signatures.items():
            members = []
            columns = np.array([[position for _, position in places] for _, places in units])
            start = 0
            for place, count in counts:
                name, dim = self.places[place]
                members.append(Member(name, dim, torch.from_numpy(columns[:, start : start + count].copy())))
                start += count
            yield Group("", tuple(members), kind, reason, statistics), [leaf for leaf, _ in units]

    def _kind(self, leaf: int) -> Kind:
        return "block" if leaf in self.marks["row"] else "position" if leaf in self.marks["place"] else "channel"

    def _units(self) -> dict[int, list[tuple[int, int]]]:
        """Return the sorted (place, position) pairs of each label, places numbered as in `self.places`."""
        leaves: list[Ids] = []
        places: list[Ids] = []
        positions: list[Ids] = []
        for number, key in enumerate(self.places):
            position, leaf = self.trace.algebra.labels.expand(self.trace.atoms[key])
            leaves.append(leaf)
            places.append(np.full_like(leaf, number))
            positions.append(position)
        if not leaves:
            return {}
        table = np.unique(np.stack([np.concatenate(part) for part in (leaves, places, positions)]), axis=1)
        starts = np.flatnonzero(np.diff(table[0], prepend=-1))
        units: dict[int, list[tuple[int, int]]] = {}
        for start, end in zip(starts, [*starts[1:], table.shape[1]], strict=True):
            label = int(table[0, start])
            if label not in self.marks[KERNEL]:
                units[label] = list(zip(table[1, start:end].tolist(), table[2, start:end].tolist(), strict=True))
        # in the order of the first member's positions
        return dict(sorted(units.items(), key=lambda item: item[1][0]))

    def _named(self, groups: Iterator[tuple[Group, list[int]]]) -> list[Group]:
        named, taken = [], Counter[str]()
        # what may be cut gets the plain names
        for group, leaves in sorted(groups, key=lambda pair: pair[0].pinned is not None):
            first = next((m for m in group.members if self._dimensions(m.tensor) > 1), group.members[0])
            stem = first.tensor.removesuffix(".weight")
            taken[stem] += 1
            name = stem if taken[stem] == 1 else f"{stem}~{taken[stem]}"
            self.home.update({leaf: (name, unit) for unit, leaf in enumerate(leaves)})
            self.labels[name] = np.array(leaves)
            named.append(Group(name, group.members, group.kind, group.pinned, group.changes_statistics))
        return named

    def _dimensions(self, name: str) -> int:
        return tensors(self.model)[name].dim()

    def _unreached(self) -> Iterator[Group]:
        seen = {name for name, _ in self.places}
        for name, parameter in self.model.named_parameters():
            if name not in seen and parameter.dim():
                indices = torch.arange(parameter.shape[0]).unsqueeze(1)
                yield Group(name.removesuffix(".weight"), (Member(name, 0, indices),), pinned=_UNREACHED)

    def _lengths(self) -> Iterator[Length]:
        """Yield what each attribute may stand for, in the order of the run."""
        modules = dict(self.model.named_modules())
        for name, sizes in self.trace.sizes.items():
            known = follows(modules[name])
            met: dict[tuple[str, int | None], list[Parts]] = defaultdict(list)
            for size in sizes:
                parts = self._parts(size)
                for attribute, item in _written(modules[name], size):
                    if attribute in known or not parts or any(_same_parts(parts, p) for p in met[attribute, item]):
                        continue
                    met[attribute, item].append(parts)
                    length = Length(name, attribute, item, size.length, parts)
                    self.sizes[length] = size
                    yield length

    def _parts(self, size: Size) -> Parts:
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for ids in size.labels:
            for position, leaf in zip(*self.trace.algebra.labels.expand(ids), strict=True):
                if int(leaf) in self.home and int(leaf) not in self.reasons:
                    group, unit = self.home[int(leaf)]
                    found[group][unit].append(int(position))
        return tuple((group, _table(units)) for group, units in found.items())


def _same_parts(one: Parts, other: Parts) -> bool:
    return len(one) == len(other) and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def _table(units: dict[int, list[int]]) -> torch.Tensor:
    """Return positions by unit, (units, most positions); -1 stands for none."""
    table = torch.full((max(units) + 1, max(map(len, units.values()))), -1)
    for unit, positions in units.items():
        table[unit, : len(positions)] = torch.tensor(positions)
    return table


def _written(module: nn.Module, size: Size) -> Iterator[tuple[str, int | None]]:
    """Yield the attributes of a module that may hold a length."""
    named = size.attribute is not None and getattr(module, size.attribute, None) == size.length
    ours = type(module).__module__.startswith("torch.nn.")
    for attribute, value in vars(module).items():
        if (named and attribute != size.attribute) or (ours and not named and attribute not in _WITHOUT_TENSORS):
            continue
        if attribute.startswith("_"):
            continue
        if type(value) is int and value == size.length:
            yield attribute, None
        elif isinstance(value, list | tuple):
            yield from ((attribute, i) for i, item in enumerate(value) if type(item) is int and item == size.length)


def _with_overlap(groups: tuple[Group, ...]) -> Iterator[Group]:
    """Yield the groups, those marked that cut the same positions of a tensor as another one."""
    users: dict[tuple[str, int], list[tuple[str, set[int]]]] = defaultdict(list)
    for group in groups:
        for member in group.members:
            users[member.tensor, member.dim].append((group.name, set(member.indices.flatten().tolist())))
    crossing = {
        name
        for sharers in users.values()
        if len(sharers) > 1
        for name, mine in sharers
        if any(mine & theirs for other, theirs in sharers if other != name)
    }
    for group in groups:
        yield Group(
            group.name, group.members, group.kind, group.pinned, group.changes_statistics, group.name in crossing
        )
