"""Range coding of symbols with counts that are learnt on the way, so that no histogram has to be stored.

Symbols lie in a matrix, and are coded band by band, a band being one row or several. All of a band are coded with the
counts of those before it, by context: how far the earlier symbols of the column were from the centre, in four bins
beside the mean of all columns, or nothing; and what a `Walk` adds. Counts are integers, so encoder and decoder agree on
every platform.

A part is, as base-128 varints, the number of symbols (0 up to the largest), the centre, the decay of the first counts
on both sides of it in 1/256, and the bins (1 or 4); then the words of the range coder, little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import constriction
import numpy as np
from numpy.typing import NDArray

from rarefy.artifact import ranges
from rarefy.artifact.codebook import read_varint, varint
from rarefy.errors import ArtifactError

Integers = NDArray[np.int64]
Symbols = NDArray[np.uint16]
Start = tuple[int, int, int, int]
"""Number of symbols, centre, decay and bins."""

MOST_SYMBOLS = 1024
_EDGES = {1: (), 4: (0, 12, 24)}
"""Bounds of the bins by their number, in 16ths of the mean over columns."""
_GAIN = 32
"""What a symbol adds to its count; the first counts sum to about 16 symbols."""
_PRIOR = 16 * _GAIN
_BANDS = 64
_SMALLEST_BAND, _LARGEST_BAND = 64, 8192


class Walk(Protocol):
    """What adds to the context of each column, and follows from the symbols above."""

    number: int
    """Different values of it."""

    def classes(self) -> Integers:
        """Return those of the coming row, one for each column."""
        ...

    def advance(self, row: Symbols) -> None:
        """Take the symbols of a row."""
        ...


def encode(symbols: NDArray[Any], width: int, centre: int, walk: Callable[[], Walk] | None = None) -> bytes | None:
    """Return the coded symbols, a whole number of rows of `width`, or None unless there are 2 to 1024 different ones.

    `walk` makes a fresh one.
    """
    number = int(symbols.max()) + 1
    if not 2 <= number <= MOST_SYMBOLS:
        return None
    decay, parts = decay_of(symbols, centre), []
    for bins in _EDGES if 1 < width < symbols.size else [1]:
        start, encoder = (number, centre, decay, bins), ranges.encoder()
        _Coder(width, symbols.size, start, walk() if walk else None).write(encoder, symbols.astype(np.uint16))
        parts.append(b"".join(map(varint, start)) + ranges.finished(encoder))
    return min(parts, key=len)


def decode(part: bytes | bytearray, size: int, width: int, walk: Walk | None = None) -> Symbols:
    """Return the `size` symbols of a part; raise `ArtifactError` when it is not sound."""
    numbers, at = [], 0
    for _ in range(4):
        value, at = read_varint(part, at)
        numbers.append(value)
    number, centre, decay, bins = numbers
    if not 2 <= number <= MOST_SYMBOLS or centre >= number or decay > 255 or bins not in _EDGES:
        raise ArtifactError(f"no counts can start from {number} symbols, {centre}, {decay} and {bins}")
    with ranges.decoding(part[at:], "codes") as decoder:
        return read(decoder, size, width, (number, centre, decay, bins), walk)


def write(encoder: Any, symbols: Symbols, start: Start) -> None:
    """Encode symbols, as rows of one."""
    _Coder(1, symbols.size, start, None).write(encoder, symbols)


def read(decoder: Any, size: int, width: int, start: Start, walk: Walk | None = None) -> Symbols:
    """Decode `size` symbols in rows of `width`, from the numbers at the start of a part."""
    return _Coder(width, size, start, walk).read(decoder)


def decay_of(symbols: NDArray[Any], centre: int) -> int:
    """Return the decay of first counts that suits symbols, in 1/256."""
    spread = float(np.abs(symbols - np.int64(centre)).mean())
    return min(round(256 * spread / (1 + spread)), 255)  # the mean distance of a two-sided geometric law, nearly


class _Coder:
    """The state that encoder and decoder share: the counts of each context."""

    def __init__(self, width: int, size: int, start: Start, walk: Walk | None) -> None:
        number, self._centre, decay, self._bins = self._start = start
        self._rows = np.empty((size // width, width), np.uint16)
        self._walk = walk
        wanted = min(max(size // _BANDS, _SMALLEST_BAND), _LARGEST_BAND)
        self._height = 1 if walk else max(1, wanted // width)
        contexts = self._bins * (walk.number if walk else 1)
        self._counts = np.tile(_first_counts(number, self._centre, decay), (contexts, 1))
        self._distances = np.zeros(width, np.int64)

    def write(self, encoder: Any, symbols: Symbols) -> None:
        def code(block: Symbols, model: Any) -> Symbols:
            encoder.encode(block.astype(np.int32).reshape(-1), model)
            return block

        self._rows = symbols.reshape(self._rows.shape)
        self._pass(code)

    def read(self, decoder: Any) -> Symbols:
        self._pass(lambda block, model: decoder.decode(model, block.size).reshape(block.shape))
        return self._rows.reshape(-1)

    def _pass(self, code: Callable[[Symbols, Any], Symbols]) -> None:
        """Give `code` the columns of each context in each band, with their model, and put in what it returns."""
        for start in range(0, len(self._rows), self._height):
            band = self._rows[start : start + self._height]
            for context, columns in self._contexts():
                model = constriction.stream.model.Categorical(self._counts[context].astype(np.float64), perfect=False)
                band[:, columns] = block = code(band[:, columns], model)
                self._counts[context] += _GAIN * np.bincount(block.reshape(-1), minlength=self._counts.shape[1])
            if self._bins > 1:
                self._distances += np.abs(band.astype(np.int64) - self._centre).sum(axis=0)
            if self._walk:
                self._walk.advance(band[0])

    def _contexts(self) -> Iterator[tuple[int, Any]]:
        """Yield each context that occurs in the coming band, with its columns."""
        if self._bins == 1 and self._walk is None:
            yield 0, slice(None)
            return
        contexts = np.zeros(len(self._distances), np.int64) if self._walk is None else self._walk.classes()
        if self._bins > 1:
            scaled, mean = 16 * self._distances * len(self._distances), int(self._distances.sum())
            bins = sum((scaled > edge * mean).astype(np.int64) for edge in _EDGES[self._bins])
            contexts = contexts * self._bins + (bins if mean else self._bins // 2)
        order = np.argsort(contexts, kind="stable")
        ends = np.cumsum(np.bincount(contexts))
        for context in np.unique(contexts):
            yield int(context), order[ends[context] - (contexts == context).sum() : ends[context]]


def _first_counts(number: int, centre: int, decay: int) -> Integers:
    """Return integers that fall on both sides of the centre, by products that are the same on every platform."""
    falling = np.cumprod(np.concatenate([[1.0], np.full(number - 1, decay / 256)]))
    shape = falling[np.abs(np.arange(number) - centre)]
    counts: Integers = np.floor(shape * (_PRIOR / shape.sum())).astype(np.int64) + 1
    return counts
