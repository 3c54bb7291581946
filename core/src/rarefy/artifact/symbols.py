"""Numbers of which few are distinct, in the way that takes the fewest bytes.

A section is a byte that tells the way, and then:

0. the plain little-endian numbers;
1. what `codebook` makes of them, with a histogram;
2. what `adaptive` makes of small numbers;
3. the number of distinct values (a base-128 varint), a measured section with these by falling frequency, and what
   `adaptive` makes of their ranks;
4. the most frequent number, how many others there are (a varint), measured what `masks` makes of their places, and a
   section with them;
5. a measured section for each byte of the numbers, low bytes first: signs and exponents are alike, and low bytes of
   rounded numbers are zero.

Measured means that its length stands before it, as a varint.

Without a histogram small tensors take fewer bytes, and so do pruned ones by their places; decoding takes longer.
"""

from __future__ import annotations

import numpy as np

from rarefy.artifact import adaptive, codebook, masks
from rarefy.artifact.bits import Bits, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.errors import ArtifactError

PLAIN, COUNTED, LEARNT, LISTED, SPARSE, PLANES = range(6)
LARGE = 1 << 20
"""Numbers from which on slow ways are taken only where a sample says that they are worth it."""
_SMALL, _SAMPLE = 1 << 12, 1 << 17
_WORTH, _ROUNDED = 0.99, 0.8
"""Shares of the bytes below which slower ways are taken for large tensors: of those with a histogram, of plain ones."""


def section(numbers: Bits, width: int = 1, masked: bool = False) -> bytes:
    """Return the numbers, in rows of `width`, as a section; `masked` ones lie in a section of kind 4 already."""
    parts = [_plain(numbers)]
    if numbers.size:
        counted = codebook.encode(numbers)
        parts += [bytes([COUNTED]) + counted] if counted is not None else []
        if _worth_learning(numbers, width, counted):
            parts += _learnt(numbers, width, masked)
        parts += _planes(numbers, width, min(map(len, parts)))
    return min(parts, key=len)


def read_section(data: bytes | bytearray, itemsize: int, size: int, width: int = 1) -> Bits:
    """Return the `size` numbers of a section; raise `ArtifactError` when it is not sound."""
    kind = data[0] if data else None
    if kind == COUNTED:
        return codebook.decode(data[1:], itemsize, size)
    if kind in (LEARNT, LISTED, SPARSE) and (not size or width < 1 or size % width):
        raise ArtifactError(f"{size} numbers do not lie in rows of {width}")
    if kind == LEARNT:
        symbols = adaptive.decode(data[1:], size, width)
        if itemsize > 2 or int(symbols.max()) >= 256**itemsize:
            raise ArtifactError(f"symbols do not stand for numbers of {itemsize} bytes")
        return symbols.astype(stored(itemsize))
    if kind == LISTED:
        return _read_listed(data, itemsize, size, width)
    if kind == SPARSE:
        return _read_sparse(data, itemsize, size, width)
    if kind == PLANES:
        return _read_planes(data, itemsize, size, width)
    if kind != PLAIN or len(data) != 1 + size * itemsize:
        raise ArtifactError(f"{size} numbers of {itemsize} bytes do not stand in {len(data)} bytes")
    return np.frombuffer(data, stored(itemsize), offset=1)


def _learnt(numbers: Bits, width: int, masked: bool = False) -> list[bytes]:
    values, counts = codebook.histogram(numbers) if not codebook.is_varied(numbers) else (numbers, None)
    if counts is None or len(values) > adaptive.MOST_SYMBOLS:
        return []
    place = int(counts.argmax())
    parts = [_sparse(numbers, width, values[place])] if counts[place] > numbers.size // 4 and not masked else []
    if numbers.itemsize <= 2 and int(values[-1]) < adaptive.MOST_SYMBOLS:
        coded = adaptive.encode(numbers, width, int(values[place]))
        parts += [bytes([LEARNT]) + coded] if coded is not None else []
        if numbers.size > _SMALL:  # a list of the numbers is for those that are far apart
            return parts
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values))
    coded = adaptive.encode(ranks[np.searchsorted(values, numbers)], width, 0)
    listed = bytes([LISTED]) + varint(len(values)) + measured(_table(values[order]))
    return [*parts, *([listed + coded] if coded is not None else [])]


def _read_listed(data: bytes | bytearray, itemsize: int, size: int, width: int) -> Bits:
    number, at = read_varint(data, 1)
    if not 2 <= number <= adaptive.MOST_SYMBOLS:
        raise ArtifactError(f"{number} distinct values are none or too many")
    listed, at = read_measured(data, at)
    if listed[:1] not in (bytes([PLAIN]), bytes([PLANES])):
        raise ArtifactError("the distinct values are not sound")
    values = read_section(listed, itemsize, number)
    ranks = adaptive.decode(data[at:], size, width)
    if int(ranks.max()) >= number:
        raise ArtifactError(f"a rank exceeds the {number} values")
    found: Bits = values[ranks]
    return found


def _plain(numbers: Bits) -> bytes:
    return bytes([PLAIN]) + numbers.tobytes()


def _table(values: Bits) -> bytes:
    """Return a section of values that are all distinct."""
    plain = _plain(values)
    return min([plain, *_planes(values, 1, len(plain))], key=len)


def _sparse(numbers: Bits, width: int, usual: Bits) -> bytes:
    mask = numbers != usual
    head = bytes([SPARSE]) + usual.tobytes() + varint(int(mask.sum()))
    return head + measured(masks.encode(mask.reshape(-1, width))) + section(numbers[mask], masked=True)


def _read_sparse(data: bytes | bytearray, itemsize: int, size: int, width: int) -> Bits:
    usual = np.frombuffer(bytes(data[1 : 1 + itemsize].ljust(itemsize)), stored(itemsize))
    count, at = read_varint(data, 1 + itemsize)
    coded, at = read_measured(data, at)
    if count > size or data[at : at + 1] == bytes([SPARSE]):
        raise ArtifactError("there are more numbers than places")
    mask = masks.decode(coded, size // width, width, count).reshape(-1)
    numbers: Bits = np.repeat(usual, size)
    numbers[mask] = read_section(data[at:], itemsize, count)
    return numbers


def _planes(numbers: Bits, width: int, least: int) -> list[bytes]:
    """Return the planes where they take fewer than `least` bytes; of large tensors only where low bytes are zero."""
    if numbers.itemsize == 1 or least <= 16:
        return []
    if numbers.size >= LARGE:
        sample = numbers[:_SAMPLE]
        if sum(len(section(plane)) for plane in _split(sample)) > _ROUNDED * sample.nbytes:
            return []
    part = bytes([PLANES]) + b"".join(measured(section(plane, width)) for plane in _split(numbers))
    return [part] if len(part) < least else []


def _split(numbers: Bits) -> list[Bits]:
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize)
    return [np.ascontiguousarray(plane) for plane in planes.T]


def _read_planes(data: bytes | bytearray, itemsize: int, size: int, width: int) -> Bits:
    planes, at = [], 1
    for _ in range(itemsize):
        plane, at = read_measured(data, at)
        if itemsize == 1 or plane[:1] == bytes([PLANES]):
            raise ArtifactError("bytes have no planes")
        planes.append(read_section(plane, 1, size, width))
    return np.stack(planes, axis=1).reshape(-1).view(stored(itemsize))


def _worth_learning(numbers: Bits, width: int, counted: bytes | None) -> bool:
    """Tell whether slower ways may take fewer bytes; of large tensors by the first rows, and markedly fewer."""
    if counted is None and numbers.itemsize == 1:
        return numbers.size <= _SMALL  # the bytes of mantissas are as good as random
    if counted is None or numbers.size < LARGE:
        return True
    sample = numbers[: max(1, _SAMPLE // width) * width]
    fast = codebook.encode(sample)
    learnt = min(map(len, _learnt(sample, width)), default=sample.nbytes)
    return fast is None or learnt < _WORTH * len(fast)
