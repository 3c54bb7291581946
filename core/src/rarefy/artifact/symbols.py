"""Numbers of which few are distinct, in the way that takes the fewest bytes.

A section is a byte that tells the way, and then: 0, the plain little-endian numbers; 1, what `codebook` makes of them,
with a histogram; 2, what `adaptive` makes of small numbers; 3, the number of distinct values (a base-128 varint), these
by falling frequency, and what `adaptive` makes of their ranks. Without a histogram small tensors take fewer bytes, and
large ones in which columns differ; decoding takes a few times as long.
"""

from __future__ import annotations

import numpy as np

from rarefy.artifact import adaptive, codebook
from rarefy.artifact.bits import Bits, stored
from rarefy.artifact.codebook import read_varint, varint
from rarefy.errors import ArtifactError

PLAIN, COUNTED, LEARNT, LISTED = range(4)
_LARGE, _SAMPLE = 1 << 20, 1 << 17
_WORTH = 0.99
"""Share of the bytes with a histogram below which the slower way is taken for large tensors."""


def section(numbers: Bits, width: int = 1) -> bytes:
    """Return the numbers, in rows of `width`, as a section."""
    parts = [bytes([PLAIN]) + numbers.tobytes()]
    if numbers.size:
        counted = codebook.encode(numbers)
        parts += [bytes([COUNTED]) + counted] if counted is not None else []
        if counted is None or numbers.size < _LARGE or _pays(numbers, width):
            parts += _learnt(numbers, width)
    return min(parts, key=len)


def read_section(data: bytes | bytearray, itemsize: int, size: int, width: int = 1) -> Bits:
    """Return the `size` numbers of a section; raise `ArtifactError` when it is not sound."""
    kind = data[0] if data else None
    if kind == COUNTED:
        return codebook.decode(data[1:], itemsize, size)
    if kind in (LEARNT, LISTED) and (not size or width < 1 or size % width):
        raise ArtifactError(f"{size} numbers do not lie in rows of {width}")
    if kind == LEARNT:
        symbols = adaptive.decode(data[1:], size, width)
        if itemsize > 2 or int(symbols.max()) >= 256**itemsize:
            raise ArtifactError(f"symbols do not stand for numbers of {itemsize} bytes")
        return symbols.astype(stored(itemsize))
    if kind == LISTED:
        return _read_listed(data, itemsize, size, width)
    if kind != PLAIN or len(data) != 1 + size * itemsize:
        raise ArtifactError(f"{size} numbers of {itemsize} bytes do not stand in {len(data)} bytes")
    return np.frombuffer(data, stored(itemsize), offset=1)


def _learnt(numbers: Bits, width: int) -> list[bytes]:
    values, counts = codebook.histogram(numbers) if not codebook.is_varied(numbers) else (numbers, None)
    if counts is None or len(values) > adaptive.MOST_SYMBOLS:
        return []
    parts = []
    if numbers.itemsize <= 2 and int(values[-1]) < adaptive.MOST_SYMBOLS:
        coded = adaptive.encode(numbers, width, int(values[counts.argmax()]))
        parts += [bytes([LEARNT]) + coded] if coded is not None else []
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values))
    coded = adaptive.encode(ranks[np.searchsorted(values, numbers)], width, 0)
    listed = bytes([LISTED]) + varint(len(values)) + values[order].tobytes()
    return [*parts, *([listed + coded] if coded is not None else [])]


def _read_listed(data: bytes | bytearray, itemsize: int, size: int, width: int) -> Bits:
    number, at = read_varint(data, 1)
    end = at + number * itemsize
    if not 2 <= number <= adaptive.MOST_SYMBOLS or end > len(data):
        raise ArtifactError(f"{number} distinct values do not stand in {len(data)} bytes")
    values = np.frombuffer(bytes(data[at:end]), stored(itemsize))
    ranks = adaptive.decode(data[end:], size, width)
    if int(ranks.max()) >= number:
        raise ArtifactError(f"a rank exceeds the {number} values")
    found: Bits = values[ranks]
    return found


def _pays(numbers: Bits, width: int) -> bool:
    """Tell from the first rows whether the slower way takes markedly fewer bytes."""
    sample = numbers[: max(1, _SAMPLE // width) * width]
    counted = codebook.encode(sample)
    learnt = min(map(len, _learnt(sample, width)), default=sample.nbytes)
    return counted is None or learnt < _WORTH * len(counted)
