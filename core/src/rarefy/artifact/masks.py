"""Range coding of which entries of a matrix are there, such as the weights that pruning left.

A mask is coded in bands of rows, and in each band first the columns 0, 8, 16, ..., then those halfway between, and so
on, so that an entry's neighbours on both sides are known. The probability of an entry is the share of those before it
in the same context: how full its column was so far (pruned inputs), how full its row is (pruned outputs), and how many
of its two neighbours are there (images, kernels). Shares are quotients of integers, which are the same on every
platform. Where nothing goes together, it takes fewer bytes to go by the share of the entries that are left.

What is stored is a byte, 1 with contexts and 0 without, and the words of the range coder, little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from rarefy.artifact import ranges
from rarefy.errors import ArtifactError

Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]

_STRIDES = (4, 2, 1)
_COLUMN_EDGES = (0, 2, 4, 8, 12, 20, 32)
_ROW_EDGES = (6, 13, 20, 32)
"""Bounds of the bins in 16ths of the mean of all columns and rows."""
_NEIGHBOURS = 3
_BANDS = 64
_LARGEST_BAND = 1 << 14
_REST = 1 / 16
"""Entries that are always thought possible, so that no probability is 0 or 1."""
_PRIOR = 2
"""Entries that the share of all is worth in a context that is new."""


def encode(mask: Mask) -> bytes:
    """Return the coded mask, `(rows, width)`."""
    return min((_encoded(mask, related) for related in (True, False)), key=len)


def decode(data: bytes | bytearray, rows: int, width: int, count: int) -> Mask:
    """Return a mask of `count` entries; raise `ArtifactError` when it is not sound."""
    if not data or data[0] > 1:
        raise ArtifactError("the places are coded in no known way")
    with ranges.decoding(data[1:], "places") as decoder:
        return read(decoder, rows, width, count, bool(data[0]))


def write(encoder: Any, mask: Mask, related: bool) -> None:
    """Encode a mask, `(rows, width)`, with contexts or without."""
    family = constriction.stream.model.Bernoulli(perfect=False)

    def code(entries: Mask, chances: NDArray[np.float64]) -> Mask:
        encoder.encode(entries.astype(np.int32), family, chances)
        return entries

    _Mask(mask.copy(), int(mask.sum()), related).walk(code)


def read(decoder: Any, rows: int, width: int, count: int, related: bool) -> Mask:
    """Decode a mask of `count` entries; raise `ArtifactError` when it has more or less."""
    family = constriction.stream.model.Bernoulli(perfect=False)
    coded = _Mask(np.zeros((rows, width), bool), count, related)
    coded.walk(lambda entries, chances: decoder.decode(family, chances).astype(bool))
    if int(coded.mask.sum()) != count:
        raise ArtifactError(f"there are not {count} places")
    return coded.mask


def _encoded(mask: Mask, related: bool) -> bytes:
    encoder = ranges.encoder()
    write(encoder, mask, related)
    return bytes([related]) + ranges.finished(encoder)


class _Mask:
    """The state that encoder and decoder share: what was seen in each context and column."""

    def __init__(self, mask: Mask, count: int, related: bool) -> None:
        self.mask, self._related = mask, related
        width = mask.shape[1]
        self._count = count
        self._density = min(max(count, 1), mask.size - 1) / mask.size if mask.size > 1 else 0.5
        self._height = max(1, min(mask.size // _BANDS, _LARGEST_BAND) // width)
        self._columns = np.zeros(width, np.int64)
        contexts = (len(_COLUMN_EDGES) + 1) * (1 + _NEIGHBOURS * (len(_ROW_EDGES) + 1))
        self._there, self._seen = np.zeros(contexts, np.int64), np.zeros(contexts, np.int64)

    def walk(self, code: Callable[[Mask, NDArray[np.float64]], Mask]) -> None:
        """Give `code` the entries and their probabilities, part by part, and put in what it returns."""
        for start in range(0, len(self.mask), self._height):
            band = self.mask[start : start + self._height]
            for columns, contexts in self._parts(band, start * band.shape[1]):
                chances = self._chances(contexts)
                entries = code(band[:, columns].reshape(-1), chances.reshape(-1))
                band[:, columns] = entries.reshape(contexts.shape)
                self._there += np.bincount(contexts.reshape(-1)[entries], minlength=len(self._there))
                self._seen += np.bincount(contexts.reshape(-1), minlength=len(self._seen))
            self._columns += band.sum(axis=0)

    def _chances(self, contexts: Integers) -> NDArray[np.float64]:
        """Return the probabilities of entries of the given contexts, of the same shape."""
        if self._related:
            there, seen = self._there[contexts].astype(np.float64), self._seen[contexts]
            return (there + _PRIOR * self._density) / (seen + _PRIOR)
        places = self.mask.size - int(self._seen[0])
        entries = min(max(self._count - int(self._there[0]), 0), places)
        return np.full(contexts.shape, (entries + _REST) / (places + 2 * _REST))

    def _parts(self, band: Mask, before: int) -> Iterator[tuple[Integers, Integers]]:
        """Yield columns that are coded together, with the contexts of their entries, `(rows, columns)`."""
        rows, width = band.shape
        if not self._related:
            yield np.arange(width), np.zeros((rows, width), np.int64)
            return
        full = _bins(16 * self._columns * width, int(self._columns.sum()), _COLUMN_EDGES)
        columns = np.arange(0, width, 2 * _STRIDES[0])
        yield columns, np.broadcast_to(full[columns], (rows, len(columns)))
        known, found = len(columns), band[:, columns].sum(axis=1)
        for stride in _STRIDES:
            columns = np.arange(stride, width, 2 * stride)
            if len(columns):
                beside = band[:, columns - stride].astype(np.int64)
                right = columns + stride < width
                beside[:, right] += band[:, columns[right] + stride]
                busy = _bins(16 * found * before, known * int(self._columns.sum()), _ROW_EDGES)
                row = (full[columns] * _NEIGHBOURS + beside) * (len(_ROW_EDGES) + 1) + busy[:, None]
                yield columns, row + len(_COLUMN_EDGES) + 1
                known, found = known + len(columns), found + band[:, columns].sum(axis=1)


def _bins(scaled: Integers, mean: int, edges: tuple[int, ...]) -> Integers:
    """Return the bin of each number beside edges in 16ths of a mean; the middle one while nothing is known."""
    if not mean:
        return np.full(len(scaled), (len(edges) + 1) // 2)
    found: Integers = (scaled[:, None] > np.array(edges) * mean).sum(axis=1)
    return found
