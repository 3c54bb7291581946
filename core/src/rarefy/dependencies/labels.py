"""Labels of channels: a union-find whose labels can be defined by others, on whole arrays at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
_MOST_PARTS = 6
_FIRST = 2**16  # networks have tens of thousands of channels, and each growth copies all labels


class Labels:
    """Numbers that stand for channels.

    Positions with the same label go together. A label may have parts: then its positions go when any of the parts
    goes, so that the rows of a projection can be removed by whole heads or by places within every head.
    """

    def __init__(self) -> None:
        self._count = 0
        self._parent: Ids = np.arange(_FIRST)
        self._parts: Ids = np.full((_FIRST, _MOST_PARTS), -1)
        self._pins: list[tuple[Ids, str]] = []
        self._marks: dict[str, list[Ids]] = {}

    @property
    def count(self) -> int:
        """Number of labels there are."""
        return self._count

    def fresh(self, count: int) -> Ids:
        """Return `count` new labels."""
        start, self._count = self._count, self._count + count
        while self._count > len(self._parent):
            old = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(old, 2 * old)])
            self._parts = np.concatenate([self._parts, np.full((old, _MOST_PARTS), -1)])
        return np.arange(start, self._count)

    def find(self, ids: Ids) -> Ids:
        """Return the representative of each label, same shape."""
        root = self._parent[ids]
        while not np.array_equal(up := self._parent[root], root):
            root = up
        self._parent[ids] = root
        return root

    def unite(self, one: Ids, other: Ids) -> None:
        """Make the labels at equal positions the same, and so their parts."""
        a, b = (part.ravel() for part in np.broadcast_arrays(one, other))
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            if (composite := self._parts[high, 0] >= 0).any():
                self._inherit(np.unique(high[composite]))

    def _inherit(self, merged: Ids) -> None:
        """Give the parts of labels that now stand for another to that one."""
        roots = self.find(merged)
        heirs, first = np.unique(roots, return_index=True)
        without = self._parts[heirs, 0] < 0
        self._parts[heirs[without]] = self._parts[merged[first[without]]]
        counts = np.stack([(self._parts[ids] >= 0).sum(1) for ids in (roots, merged)])
        for ours, theirs in np.unique(counts, axis=1).T:
            same = (counts == [[ours], [theirs]]).all(0)
            one, other = self._parts[roots[same], :ours], self._parts[merged[same], :theirs]
            self.unite_sets(list(one.T), list(other.T))

    def unite_sets(self, one: Sequence[Ids], other: Sequence[Ids]) -> None:
        """Make positions that go when any label of `one` goes, go when any of `other` goes, and no sooner."""
        ours, theirs = self.leaves(one), self.leaves(other)
        if len(ours) == len(theirs) == 1:
            self.unite(ours[0], theirs[0])
            return
        if len(ours) != len(theirs):
            roots = [set(np.concatenate([self.find(ids).ravel() for ids in side]).tolist()) for side in (ours, theirs)]
            # a label that becomes its own part would have no end
            if 1 not in (len(ours), len(theirs)) or roots[0] & roots[1]:
                for ids in (*ours, *theirs):
                    self.pin(ids, "two operators split it in different ways")
            else:
                self.unite(self.joint(ours), self.joint(theirs))
            return
        rest = list(theirs)
        pairs, unlike = [], []
        for ids in ours:
            alike = next(
                (i for i, candidate in enumerate(rest) if _same_partition(self.find(ids), self.find(candidate))), None
            )
            if alike is None:
                unlike.append(ids)
            else:
                pairs.append((ids, rest.pop(alike)))
        for ids, candidate in (*pairs, *zip(unlike, rest, strict=True)):
            self.unite(ids, candidate)

    def leaves(self, sets: Sequence[Ids]) -> list[Ids]:
        """Return equivalent label arrays without those that all have parts."""
        found: list[Ids] = []
        for ids in sets:
            roots = self.find(ids)
            if (self._parts[roots, 0] < 0).any():
                found.append(ids)
                continue
            parts = self._parts[roots]
            counts = np.unique((parts >= 0).sum(-1))
            if len(counts) == 1:
                found += self.leaves([parts[..., i] for i in range(counts[0])])
            else:
                found.append(ids)
        return found

    def joint(self, sets: Sequence[Ids]) -> Ids:
        """Return one label array equivalent to several."""
        if len(sets) == 1:
            return sets[0]
        arrays = [self.find(array) for array in np.broadcast_arrays(*sets)]
        keys, inverse = np.unique(np.stack([array.ravel() for array in arrays]), axis=1, return_inverse=True)
        labels = self.fresh(keys.shape[1])
        self.define(labels, list(keys))
        return labels[inverse].reshape(arrays[0].shape)

    def define(self, labels: Ids, parts: Sequence[Ids]) -> None:
        """Give labels their parts; those that have some already go with both."""
        if len(parts) > _MOST_PARTS:
            for ids in parts:
                self.pin(ids, f"it is split in more than {_MOST_PARTS} ways")
            return
        whole = self._parts[self.find(labels), 0] < 0
        self._parts[self.find(labels[whole]), : len(parts)] = np.stack([ids[whole] for ids in parts], -1)
        if not whole.all():
            self.unite_sets([labels[~whole]], [ids[~whole] for ids in parts])

    def pin(self, ids: Ids, reason: str) -> None:
        """Forbid the removal of labels."""
        self._pins.append((ids.ravel(), reason))

    def mark(self, ids: Ids, what: str) -> None:
        """Attach a property to labels."""
        self._marks.setdefault(what, []).append(ids.ravel())

    def pinned(self) -> dict[int, str]:
        """Return the first reason of every label without parts that may not be removed."""
        reasons: dict[int, str] = {}
        for ids, reason in self._pins:
            for leaf in self.expand(ids)[1].tolist():
                reasons.setdefault(leaf, reason)
        return reasons

    def marked(self, what: str) -> set[int]:
        """Return the labels without parts that carry a property."""
        return {leaf for ids in self._marks.get(what, ()) for leaf in self.expand(ids)[1].tolist()}

    def expand(self, ids: Ids) -> tuple[Ids, Ids]:
        """Return (positions, leaves): which labels without parts each position of a flat array goes with."""
        found = list(self._expand(np.arange(len(ids)), ids))
        return np.concatenate([p for p, _ in found]), np.concatenate([leaf for _, leaf in found])

    def _expand(self, positions: Ids, ids: Ids) -> Iterator[tuple[Ids, Ids]]:
        roots = self.find(ids)
        composite = self._parts[roots, 0] >= 0
        yield positions[~composite], roots[~composite]
        if composite.any():
            parts = self._parts[roots[composite]]
            for column in parts.T:
                there = column >= 0
                yield from self._expand(positions[composite][there], column[there])


def _same_partition(one: Ids, other: Ids) -> bool:
    a, b = (part.ravel() for part in np.broadcast_arrays(one, other))
    return len(np.unique(a)) == len(np.unique(b)) == len(np.unique(np.stack([a, b]), axis=1).T)
