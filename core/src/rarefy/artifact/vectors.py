"""Lossless coding of tensors in which vectors of consecutive elements repeat, as vector quantization leaves them.

A part is, as base-128 varints, the elements of a vector and the number of distinct ones; then, with its length, a
section with these, one after the other; then a section with the rank of each vector of the tensor among them, in one
byte or two (see `symbols`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rarefy.artifact.bits import Bits, elements, row_width, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.artifact.symbols import read_section, section
from rarefy.errors import ArtifactError

LENGTHS = (2, 3, 4, 6, 8, 9, 16, 25, 32)
MOST_VECTORS = 65536
_SAMPLE = 4096
_MOST_DISTINCT = 0.75
"""Share of distinct vectors in a sample at which repetition is not worth looking for."""


def encode(bits: Bits, shape: tuple[int, ...]) -> bytes | None:
    """Return the coded elements, or None when they would not become smaller.

    Vectors are sought that divide the entries of each index of the first dimension.
    """
    width = row_width(shape)
    candidates = [
        _encoded(bits, length, width // length) for length in LENGTHS if width >= length and width % length == 0
    ]
    parts = [part for part in candidates if part is not None]
    smallest = min(parts, key=len, default=None)
    return smallest if smallest is not None and len(smallest) < bits.nbytes else None


def decode(part: bytes | bytearray, itemsize: int, shape: tuple[int, ...]) -> Bits:
    """Return the elements of a part; raise `ArtifactError` when it is not sound."""
    size = elements(shape)
    length, at = read_varint(part, 0)
    count, at = read_varint(part, at)
    if length not in LENGTHS or size % length or not 1 <= count <= min(MOST_VECTORS, size // length):
        raise ArtifactError(f"{count} vectors of {length} do not fit {size} elements")
    table, at = read_measured(part, at)
    vectors = read_section(table, itemsize, count * length).reshape(count, length)
    ranks = read_section(part[at:], _rank_size(count), size // length, max(1, row_width(shape) // length))
    if int(ranks.max()) >= count:
        raise ArtifactError(f"a rank exceeds the {count} vectors")
    bits: Bits = vectors[ranks].reshape(-1)
    return bits


def _encoded(bits: Bits, length: int, width: int) -> bytes | None:
    rows = bits.reshape(-1, length)
    sample = rows[:: max(1, len(rows) // _SAMPLE)]
    if len(_distinct(sample)[0]) > _MOST_DISTINCT * len(sample):
        return None
    vectors, ranks = _distinct(rows)
    if len(vectors) > MOST_VECTORS:
        return None
    head = varint(length) + varint(len(vectors)) + measured(section(vectors.reshape(-1)))
    return head + section(ranks.astype(stored(_rank_size(len(vectors)))), width)


def _distinct(rows: Bits) -> tuple[Bits, NDArray[np.int64]]:
    """Return the distinct rows, ascending by their bytes, and the rank of each row among them."""
    whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
    found, ranks = np.unique(whole, return_inverse=True)
    return found.view(rows.dtype).reshape(-1, rows.shape[1]), ranks.reshape(-1)


def _rank_size(count: int) -> int:
    return 1 if count <= 256 else 2
