"""Label fields: which channel each element of a tensor belongs to.

A tensor may lie in several fields at once: a weight in one per dimension, a query in one for its heads and one for
the places within a head. A field has as many axes as its tensor, of size 1 where the label does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from rarefy.dependencies.labels import Ids, Labels

Field = torch.Tensor
Fields = list[Field]
Shape = Sequence[int]


def axes(field: Field) -> set[int]:
    """Return the axes on which the label depends."""
    return {d for d, size in enumerate(field.shape) if size > 1}


def along(labels: Ids, axis: int, ndim: int) -> Field:
    """Return the field of a tensor with `ndim` axes whose channels lie along one of them."""
    return torch.from_numpy(labels).reshape([-1 if d == axis else 1 for d in range(ndim)])


def compress(field: Field) -> Field:
    """Return the field with size 1 on each axis that makes no difference."""
    for d, size in enumerate(field.shape):
        if size > 1 and (field.stride(d) == 0 or _constant(field, d)):
            field = field.narrow(d, 0, 1)
    return field


def _constant(field: Field, axis: int) -> bool:
    if not torch.equal(field.select(axis, 0), field.select(axis, 1)):
        return False
    return bool((field == field.narrow(axis, 0, 1)).all())


def moved(field: Field, shape: Shape, move: Callable[[Field], Field]) -> Field:
    """Return the field after data of `shape` was moved by `move`."""
    return compress(move(field.expand(shape)))


def numbers(field: Field) -> Ids:
    """Return the labels as an array."""
    return field.numpy()


class Algebra:
    """What happens to fields when tensors meet, and what that says of their labels."""

    def __init__(self) -> None:
        self.labels = Labels()

    def pin(self, fields: Fields, reason: str) -> None:
        """Forbid the removal of all channels of the fields."""
        for field in fields:
            self.labels.pin(numbers(field), reason)

    def mark(self, fields: Fields, what: str) -> None:
        """Attach a property to all channels of the fields."""
        for field in fields:
            self.labels.mark(numbers(field), what)

    def collapse(self, field: Field, axis: int) -> Field:
        """Unite all labels along an axis."""
        first = field.narrow(axis, 0, 1)
        self.labels.unite(numbers(first), numbers(field))
        return first

    def meet(self, one: Fields, one_shape: Shape, other: Fields, other_shape: Shape, reason: str) -> Fields:
        """Return the fields of two tensors combined element by element, after broadcasting; labels that meet unite."""
        ndim = max(len(one_shape), len(other_shape))
        ours, theirs = _padded(one, ndim), _padded(other, ndim)
        sizes = [_shape(shape, ndim) for shape in (one_shape, other_shape)]
        found: Fields = []
        for cluster in _clusters([*ours, *theirs]):
            a = [field for field in ours if axes(field) & cluster]
            b = [field for field in theirs if axes(field) & cluster]
            if a and b:
                self.labels.unite_sets([numbers(f) for f in a], [numbers(f) for f in b])
            elif any(sizes[1 if a else 0][d] > 1 for d in cluster):
                self.pin(a or b, reason)
            found += a if a and (not b or len(a) <= len(b)) else b
        return found

    def contract(self, one: Fields, one_axis: int, other: Fields, other_axis: int, reason: str) -> None:
        """Unite the channels of two tensors along the axes that are summed over together."""
        a = [self._line(field, one_axis) for field in one if one_axis in axes(field)]
        b = [self._line(field, other_axis) for field in other if other_axis in axes(field)]
        if a and b:
            self.labels.unite_sets(a, b)
        else:
            for ids in (*a, *b):
                self.labels.pin(ids, reason)

    def _line(self, field: Field, axis: int) -> Ids:
        """Return the labels along one axis, after uniting those that share a place on it."""
        for d in axes(field) - {axis}:
            field = self.collapse(field, d)
        return numbers(field.reshape(-1))

    def reshape(self, field: Field, old: Shape, new: Shape, reason: str, *, name: bool = True) -> Fields:
        """Return the fields after a tensor of shape `old` became one of shape `new` in the same order of elements.

        Channels along an axis that is split become rows and places in a row, which can be removed separately.
        """
        if 0 in old:  # rows that nobody chose: the other axes are as ever
            old, new = ([n or 1 for n in shape] for shape in (old, new))
            if math.prod(old) != math.prod(new):
                self.pin([field], reason)
                return []
        full, sizes, split = list(field.shape), [], []
        for before, after in _blocks(old, new):
            varying = [d for d in before if field.shape[d] > 1]
            sizes += [new[d] for d in after] if varying else [1] * len(after)
            if varying:
                split.append((len(varying), after))
                for d in before:
                    full[d] = old[d]
        result = compress(field.expand(full).reshape(sizes))
        fields = [result]
        for count, after in split:
            if len(over := sorted(axes(result) & set(after))) > count:
                fields = [part for field in fields for part in self.factorise(field, over, reason, name=name)]
        return fields

    def factorise(self, field: Field, over: Sequence[int], reason: str, *, name: bool = True) -> Fields:
        """Return one field per axis in `over`: a channel goes when its row goes or its place within the rows.

        When rows are no copies of each other with channels of their own, the channels are pinned and in no field.
        """
        if len(over) < 2:
            return [field]
        leaves = self.labels.leaves([numbers(field)])
        if len(leaves) > 1:
            parts = [compress(torch.from_numpy(np.ascontiguousarray(ids))) for ids in leaves]
            return [
                f
                for part in parts
                for f in self.factorise(part, [d for d in over if d in axes(part)], reason, name=name)
            ]
        axis = over[0]
        ids = self.labels.find(np.moveaxis(leaves[0], axis, 0).reshape(field.shape[axis], -1))
        places = _places(ids)
        if places is None:
            self.labels.pin(ids, reason)
            return []
        rows, inner = self.labels.fresh(len(ids)), self.labels.fresh(int(places.max()) + 1)
        if name:
            self.labels.mark(rows, "row")
            self.labels.mark(inner, "place")
        first = np.unique(places, return_index=True)[1]
        own = ids[:, first]
        self.labels.define(own.ravel(), [np.repeat(rows, len(first)), np.tile(inner, len(rows))])
        shape = list(field.shape)
        shape[axis] = 1
        rest = compress(torch.from_numpy(inner[places]).reshape(shape))
        return [along(rows, axis, field.ndim), *self.factorise(rest, list(over[1:]), reason, name=name)]


def _places(ids: Ids) -> Ids | None:
    """Return the place of each column within its row, None when the rows differ in pattern or share labels."""
    places = np.unique(ids[0], return_inverse=True)[1].reshape(-1)
    first = np.unique(places, return_index=True)[1]
    own = ids[:, first]
    if len(np.unique(own)) != own.size or not np.array_equal(own[:, places], ids):
        return None
    return places


def _padded(fields: Fields, ndim: int) -> Fields:
    return [field.reshape([1] * (ndim - field.ndim) + list(field.shape)) for field in fields]


def _shape(shape: Shape, ndim: int) -> list[int]:
    return [1] * (ndim - len(shape)) + list(shape)


def _clusters(fields: Fields) -> list[set[int]]:
    """Return sets of axes such that no field varies along axes of two of them."""
    clusters: list[set[int]] = []
    for field in fields:
        new = axes(field)
        for old in [cluster for cluster in clusters if cluster & new]:
            clusters.remove(old)
            new |= old
        if new:
            clusters.append(new)
    return clusters


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Return which axes of `old` become which of `new`, in the smallest pieces whose sizes agree."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = ([i] if i < len(old) else []), ([j] if j < len(new) else [])
        i, j = i + len(before), j + len(after)
        while math.prod(old[d] for d in before) != math.prod(new[d] for d in after):
            if math.prod(old[d] for d in before) < math.prod(new[d] for d in after):
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        blocks.append((before, after))
    return blocks
