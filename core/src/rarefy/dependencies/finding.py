"""From a model and example inputs to groups."""

from __future__ import annotations

import copy
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from rarefy.dependencies.cutting import forget_
from rarefy.dependencies.groups import Dependencies, Group, Kind, Length, Member, tensors
from rarefy.dependencies.labels import Ids
from rarefy.dependencies.operators.layers import KERNEL
from rarefy.dependencies.operators.reductions import RATIO, STATISTICS
from rarefy.dependencies.tracing import Size, Trace, tracing, written_lengths
from rarefy.errors import StageError
from rarefy.modules.attention import opened
from rarefy.modules.skeleton import meta_copy
from rarefy.technique import replace_

Inputs = tuple[Any, ...]
Parts = tuple[tuple[str, torch.Tensor], ...]
log = logging.getLogger("rarefy")
_UNREACHED = "the example inputs do not reach it"


def observe(model: nn.Module, inputs: Inputs) -> Observation:
    """Run the model once and return what the run shows; `model` is not changed.

    The run is one on the meta device, which computes nothing, unless the model or a rule asks for values or a recurrent
    layer decomposes another way there. Raises `StageError` when the model does not run on the inputs.
    """
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        try:
            return _observed(meta_copy(model), on_meta(inputs), valueless=True)
        except Exception as error:  # whatever there is that does not run without values
            log.debug("not traced without values: %s: %s", type(error).__name__, error)
    return _observed(_copy(model), fresh(inputs), valueless=False)


def _observed(twin: nn.Module, inputs: Inputs, valueless: bool) -> Observation:
    forget_(twin)
    # before the head counts of torch's attention are opened, under the names of the model's own tensors
    names = {id(tensor): name for name, tensor in tensors(twin).items()}
    for module in [m for m in twin.modules() if type(m) is nn.MultiheadAttention]:
        replace_(twin, module, opened(module))
    trace = Trace(names, valueless=valueless)
    with torch.random.fork_rng(devices=[]), tracing(trace, twin.eval()):
        try:
            out = twin(*inputs)
        except Exception as error:
            raise StageError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}"
            ) from error
    for leaf in leaves(out):
        if isinstance(leaf, torch.Tensor):
            trace.algebra.pin(trace.fields(leaf), "it is part of the model's output")
            trace.pin_numbers([leaf])
    return Observation(trace, twin)


class Observation:
    """What a run showed, and what trials added to it."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.model = trace, model
        self.labels: dict[str, Ids] = {}
        """Labels of the units of each group."""
        self.sizes: dict[Length, Size] = {}
        self.ratios: set[str] = set()
        """Groups over which a statistic is taken that counts the units."""

    def groups(self) -> Dependencies:
        """Return the groups by what is known now."""
        extraction = _Extraction(self.trace, self.model)
        found = extraction.dependencies()
        self.labels, self.sizes = extraction.labels, extraction.sizes
        ratios = self.trace.algebra.labels.marked(RATIO)
        self.ratios = {name for name, ids in self.labels.items() if not ratios.isdisjoint(ids.tolist())}
        return found

    def pin(self, group: str, reason: str) -> None:
        """Forbid the removal of a group's units."""
        self.trace.algebra.labels.pin(self.labels[group], reason)

    def unite(self, groups: Sequence[str]) -> None:
        """Make equal units of groups go together."""
        for name in groups[1:]:
            self.trace.algebra.labels.unite(self.labels[groups[0]], self.labels[name])

    def tie(self, lengths: Sequence[Length]) -> None:
        """Make axes change together."""
        sizes = [self.sizes[length] for length in lengths]
        for size in sizes[1:]:
            self.trace.algebra.labels.unite_sets(list(sizes[0].labels), list(size.labels))


def fresh(inputs: Inputs) -> Inputs:
    """Return inputs that a model may write into."""
    copied: Inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return copied


def on_meta(inputs: Inputs) -> Inputs:
    """Return inputs of the same shapes without values."""
    moved: Inputs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return moved


def leaves(value: Any) -> list[Any]:
    """Return what a value holds, also within objects such as dataclasses, without following an object twice."""
    found: list[Any] = []
    waiting, seen = [value], set[int]()
    while waiting:
        for leaf in tree_leaves(waiting.pop(0)):
            inner = None if isinstance(leaf, torch.Tensor | nn.Module | type) else getattr(leaf, "__dict__", None)
            if is_dataclass(leaf) and not isinstance(leaf, type):
                inner = {field.name: getattr(leaf, field.name) for field in fields(leaf)}
            if not inner:
                found.append(leaf)
            elif id(leaf) not in seen:
                seen.add(id(leaf))
                waiting.append(inner)
    return found


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy, since a forward may write into parameters and buffers; raise `StageError` when there is none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise StageError(
            f"the model cannot be copied: {type(error).__name__}: {error}; modules must hold no tensors with a history "
            "besides their parameters and buffers (torch.nn.utils.parametrizations.weight_norm holds none)"
        ) from error


class _Extraction:
    """Turns labels into groups, on whole arrays: a network has tens of thousands of units."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.model = trace, model
        self.shapes = {name: tensor.shape for name, tensor in tensors(model).items()}
        self.parameters = dict(model.named_parameters()).keys()
        labels = trace.algebra.labels
        self.places = list(trace.atoms)
        self.reasons = labels.pinned()
        self.marks = {what: labels.marked(what) for what in (KERNEL, STATISTICS, "row", "place")}
        self.group_of, self.unit_of = (np.full(labels.count, -1) for _ in range(2))
        """Number of the group of each label that may be cut, and of the unit within it."""
        read = {int(ids[0]) for ids in trace.readers}
        self.readers = {place for place, ids in trace.atoms.items() if int(ids[0]) in read}
        self.labels: dict[str, Ids] = {}
        """Labels of the units of each group."""
        self.sizes: dict[Length, Size] = {}
        """Where each length was seen."""

    def dependencies(self) -> Dependencies:
        """Return groups with names, and the lengths that depend on them."""
        groups = self._named(list(self._groups()))
        free = tuple(group for group in groups if group.pinned is None)
        return Dependencies(
            tuple(_with_overlap(free)),
            (*(group for group in groups if group.pinned is not None), *self._unreached()),
            tuple(self._lengths([group.name for group in groups])),
            self.shapes,
        )

    def _groups(self) -> Iterator[tuple[Group, Ids]]:
        """Yield groups without names, with the labels of their units."""
        table = self._table()
        starts = np.flatnonzero(np.diff(table[0], prepend=-1))
        leaves = table[0, starts]
        fates = [self._fate(leaf) for leaf in leaves.tolist()]
        kinds = {fate: i for i, fate in enumerate(dict.fromkeys(fates))}
        # units are alike when the sums of random numbers that stand for their slices are
        numbers = np.random.default_rng(0).integers(1, 2**62, len(self.places))
        alike = np.add.reduceat(numbers[table[1]], starts) if len(starts) else starts
        keys = (
            np.stack([alike, np.array([kinds[fate] for fate in fates], np.int64)]) if len(starts) else np.empty((2, 0))
        )
        _, first, which = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        ends = np.append(starts[1:], table.shape[1])
        for number in np.argsort(table[1, starts[first]], kind="stable"):
            chosen = np.flatnonzero(which.reshape(-1) == number)
            rows = table[:, starts[chosen[0]] : ends[chosen[0]]]
            span = np.arange(rows.shape[1])
            positions = table[2][starts[chosen][:, None] + span]
            order = np.argsort(positions[:, 0], kind="stable")
            members = tuple(
                Member(
                    self.places[place][0],
                    self.places[place][1],
                    torch.from_numpy(positions[order][:, rows[1] == place]),
                    self.places[place] in self.readers,
                )
                for place in dict.fromkeys(rows[1].tolist())
            )
            reason, statistics, kind = fates[chosen[0]]
            if reason is None and len(chosen) == 1:
                reason = "it is one unit, and something has to stay"
            elif reason is None and not any(member.tensor in self.parameters for member in members):
                reason = "no parameter belongs to it"
            yield Group("", members, kind, reason, statistics), leaves[chosen][order]

    def _fate(self, leaf: int) -> tuple[str | None, bool, Kind]:
        kind: Kind = "block" if leaf in self.marks["row"] else "position" if leaf in self.marks["place"] else "channel"
        return self.reasons.get(leaf), leaf in self.marks[STATISTICS], kind

    def _table(self) -> Ids:
        """Return columns (label, place, position), sorted; places are numbered as in `self.places`."""
        places, longest = len(self.places), 1 + max((len(ids) for ids in self.trace.atoms.values()), default=0)
        keys = [np.empty(0, np.int64)]
        for number, key in enumerate(self.places):
            position, leaf = self.trace.algebra.labels.expand(self.trace.atoms[key])
            keys.append((leaf * places + number) * longest + position)
        ordered = np.sort(np.concatenate(keys))
        ordered = ordered[np.diff(ordered, prepend=-1) > 0]
        pairs, position = np.divmod(ordered, longest)
        table = np.stack([*np.divmod(pairs, max(places, 1)), position])
        kernel = np.zeros(self.trace.algebra.labels.count, bool)
        kernel[list(self.marks[KERNEL])] = True
        return table[:, ~kernel[table[0]]]

    def _named(self, groups: list[tuple[Group, Ids]]) -> list[Group]:
        named: list[Group] = []
        taken = Counter[str]()
        # what may be cut gets the plain names, and whole blocks before places in them
        for group, leaves in sorted(groups, key=lambda pair: (pair[0].pinned is not None, pair[0].kind == "position")):
            first = next((m for m in group.members if len(self.shapes[m.tensor]) > 1), group.members[0])
            stem = first.tensor.removesuffix(".weight")
            taken[stem] += 1
            name = stem if taken[stem] == 1 else f"{stem}~{taken[stem]}"
            if group.pinned is None:
                self.group_of[leaves], self.unit_of[leaves] = len(named), np.arange(len(leaves))
            self.labels[name] = leaves
            named.append(replace(group, name=name))
        return named

    def _unreached(self) -> Iterator[Group]:
        seen = {name for name, _ in self.places}
        for name, parameter in self.model.named_parameters():
            if name not in seen and parameter.dim():
                indices = torch.arange(parameter.shape[0]).unsqueeze(1)
                yield Group(name.removesuffix(".weight"), (Member(name, 0, indices),), pinned=_UNREACHED)

    def _lengths(self, names: list[str]) -> Iterator[Length]:
        """Yield what each attribute may stand for, in the order of the run."""
        modules = dict(self.model.named_modules())
        for name, sizes in self.trace.sizes.items():
            met: dict[tuple[str, int | None], list[Parts]] = defaultdict(list)
            for size in sizes:
                parts = self._parts(size, names)
                for attribute, item in _written(modules[name], size):
                    if not parts or any(_same_parts(parts, p) for p in met[attribute, item]):
                        continue
                    met[attribute, item].append(parts)
                    length = Length(name, attribute, item, size.length, parts)
                    self.sizes[length] = size
                    yield length

    def _parts(self, size: Size, names: list[str]) -> Parts:
        """Return the groups whose units shorten an axis, with the positions of their units."""
        expanded = [self.trace.algebra.labels.expand(ids) for ids in size.labels]
        positions, leaves = (np.concatenate(part) for part in zip(*expanded, strict=True))
        groups, units = self.group_of[leaves], self.unit_of[leaves]
        return tuple(
            (
                name := names[number],
                _by_unit(units[groups == number], positions[groups == number], len(self.labels[name])),
            )
            for number in np.unique(groups[groups >= 0])
        )


def _same_parts(one: Parts, other: Parts) -> bool:
    return len(one) == len(other) and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def _by_unit(units: Ids, positions: Ids, count: int) -> torch.Tensor:
    """Return positions by unit, (units, most positions); -1 stands for none, and a unit may have none."""
    order = np.lexsort((positions, units))
    units, positions = units[order], positions[order]
    counts = np.bincount(units, minlength=count)
    rank = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), counts.max()), -1)
    table[units, rank] = positions
    return torch.from_numpy(table)


def _written(module: nn.Module, size: Size) -> Iterator[tuple[str, int | None]]:
    """Yield the attributes of a module that may hold a length."""
    named = size.attribute is not None and getattr(module, size.attribute, None) == size.length
    for attribute, item, value in written_lengths(module):
        if value == size.length and not named:
            yield attribute, item
    if named and size.attribute is not None:
        yield size.attribute, None


def _with_overlap(groups: tuple[Group, ...]) -> Iterator[Group]:
    """Yield the groups, those marked that cut the same positions of a tensor as another one."""
    users: dict[tuple[str, int], list[tuple[int, Ids]]] = defaultdict(list)
    for number, group in enumerate(groups):
        for member in group.members:
            users[member.tensor, member.dim].append((number, member.indices.numpy()))
    crossing: set[int] = set()
    for sharers in users.values():
        if len(sharers) > 1:
            met = [(number, np.unique(positions)) for number, positions in sharers]
            shared = np.bincount(np.concatenate([positions for _, positions in met])) > 1
            crossing |= {number for number, positions in met if shared[positions].any()}
    for number, group in enumerate(groups):
        yield replace(group, overlaps=number in crossing)
