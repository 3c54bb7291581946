"""Lossless coding of sparse tensors as Deep Compression's: distances between entries and codes, by Huffman codes.

Han, Mao & Dally 2016, sections 2 to 4: what is stored is each weight that is not zero, as its code and its distance to
the one before, of at most 2^b; where the next is farther, a zero is stored in between. Range coding (`codebook`) takes
fewer bytes; this is here so that the published figures can be compared with like.

A part is, as base-128 varints, the number of values, b, and the number of entries; the values other than zero, in
ascending order of their bits; a byte with the length of the codeword of each value, of the zero in between, and of each
distance from 1 on; the codewords of the codes with their number of bytes; and those of the distances.
"""

from __future__ import annotations

import numpy as np

from rarefy.artifact import huffman
from rarefy.artifact.bits import Bits, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.artifact.huffman import Integers
from rarefy.errors import ArtifactError

MOST_VALUES = 4096
DISTANCE_BITS = range(1, 13)


def encode(bits: Bits) -> bytes | None:
    """Return the coded elements, with the b that needs the fewest bytes; None when they would not become smaller."""
    places = np.flatnonzero(bits)
    if not len(places):
        return None
    values = np.unique(bits[places])
    if len(values) > MOST_VALUES:
        return None
    codes = np.searchsorted(values, bits[places])
    parts = [_encoded(values, codes, places, most) for most in DISTANCE_BITS]
    part = min((part for part in parts if part is not None), key=len, default=None)
    return part if part is not None and len(part) < bits.nbytes else None


def decode(part: bytes | bytearray, itemsize: int, size: int) -> Bits:
    """Return the `size` elements of a part; raise `ArtifactError` when it is not sound."""
    number, at = read_varint(part, 0)
    most, at = read_varint(part, at)
    entries, at = read_varint(part, at)
    end = at + number * itemsize
    tables = end + number + 1 + (1 << min(most, DISTANCE_BITS.stop))
    if not 1 <= number <= MOST_VALUES or most not in DISTANCE_BITS or entries > size or tables > len(part):
        raise ArtifactError(f"{number} values and {entries} entries do not fit {size} elements in {len(part)} bytes")
    values = np.zeros(number + 1, stored(itemsize))
    values[:-1] = np.frombuffer(bytes(part[at:end]), stored(itemsize))
    lengths = np.frombuffer(bytes(part[end:tables]), np.uint8).astype(np.int64)
    data, at = read_measured(part, tables)
    codes = _symbols(data, lengths[: number + 1], entries)
    distances = _symbols(part[at:], lengths[number + 1 :], entries) + 1
    places = np.cumsum(distances) - 1
    if entries and places[-1] >= size:
        raise ArtifactError("the distances lead beyond the tensor")
    bits = np.zeros(size, stored(itemsize))
    bits[places] = values[codes]
    return bits


def _encoded(values: Bits, codes: Integers, places: Integers, most: int) -> bytes | None:
    reach = 1 << most
    steps = np.diff(places, prepend=-1)
    between = (steps - 1) // reach
    if between.sum() > 4 * len(places):
        return None
    ends = np.cumsum(between + 1) - 1
    entries = np.full(ends[-1] + 1, len(values))
    entries[ends] = codes
    distances = np.full(len(entries), reach)
    distances[ends] = steps - between * reach
    return _written(values, most, entries, distances - 1)


def _written(values: Bits, most: int, entries: Integers, distances: Integers) -> bytes | None:
    lengths = [
        huffman.lengths(np.bincount(entries, minlength=len(values) + 1)),
        huffman.lengths(np.bincount(distances, minlength=1 << most)),
    ]
    if max(int(length.max()) for length in lengths) > huffman.LONGEST:
        return None
    head = varint(len(values)) + varint(most) + varint(len(entries)) + values.tobytes()
    tables = b"".join(length.astype(np.uint8).tobytes() for length in lengths)
    return head + tables + measured(_words(entries, lengths[0])) + _words(distances, lengths[1])


def _words(symbols: Integers, lengths: Integers) -> bytes:
    """Return codewords, or the symbol where there is but one."""
    return huffman.encode(symbols, lengths) if lengths.any() else varint(int(symbols[0]))


def _symbols(data: bytes | bytearray, lengths: Integers, size: int) -> Integers:
    if lengths.any():
        return huffman.decode(data, lengths, size)
    symbol, end = read_varint(data, 0)
    if end != len(data) or symbol >= len(lengths):
        raise ArtifactError("a lone symbol is not sound")
    return np.full(size, symbol)
