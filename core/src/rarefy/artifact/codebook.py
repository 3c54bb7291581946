"""Lossless coding of tensors with few distinct values: the values once, then range-coded codes.

A part is: number of values, the values in ascending order of their bits, the count of each but the last (all numbers
as base-128 varints), and the words of the range coder, little-endian. The probabilities are the exact counts, which
both sides have as integers, so encoder and decoder agree on every platform.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from rarefy.artifact import ranges
from rarefy.artifact.bits import Bits, stored
from rarefy.errors import ArtifactError

MOST_VALUES = 65536
_CHUNK = 1 << 20


def encode(bits: Bits) -> bytes | None:
    """Return the coded elements, or None when they would not become smaller."""
    if bits.size == 0 or is_varied(bits):
        return None
    values, counts = histogram(bits)
    if len(values) > MOST_VALUES:
        return None
    head = varint(len(values)) + values.tobytes() + b"".join(varint(int(count)) for count in counts[:-1])
    information = float((counts * np.log2(bits.size / counts)).sum()) / 8
    if len(head) + information >= bits.nbytes:
        return None
    part = head + _encode_codes(bits, values, counts)
    return part if len(part) < bits.nbytes else None


def decode(part: bytes | bytearray, itemsize: int, size: int) -> Bits:
    """Return the `size` elements of a part; raise `ArtifactError` when it is not sound."""
    values, counts, codes = _read_head(part, itemsize, size)
    if len(values) == 1:
        if codes:
            raise ArtifactError("a constant tensor has codes")
        return np.full(size, values[0])
    model, bits = _model(counts), np.empty(size, values.dtype)
    with ranges.decoding(codes, "codes") as decoder:
        for start in range(0, size, _CHUNK):
            end = min(start + _CHUNK, size)
            bits[start:end] = values[decoder.decode(model, end - start)]
    return bits


def histogram(bits: Bits) -> tuple[Bits, NDArray[np.int64]]:
    """Return the distinct elements in ascending order, and how often each occurs."""
    if bits.itemsize > 2:
        return np.unique(bits, return_counts=True)
    counts = np.zeros(256**bits.itemsize, np.int64)
    for start in range(0, bits.size, _CHUNK):
        counts += np.bincount(bits[start : start + _CHUNK], minlength=counts.size)
    values = np.flatnonzero(counts)
    return values.astype(bits.dtype), counts[values]


def is_varied(bits: Bits) -> bool:
    """Tell from a sample that there are too many distinct values; saves sorting large dense tensors."""
    sample = bits[:: max(1, bits.size // (4 * MOST_VALUES))]
    return sample.size < bits.size and len(np.unique(sample)) > MOST_VALUES


def measured(data: bytes) -> bytes:
    """Return bytes with their number before them."""
    return varint(len(data)) + data


def read_measured(data: bytes | bytearray, start: int) -> tuple[bytes | bytearray, int]:
    """Return the bytes that start at `start` with their number, and where they end."""
    length, start = read_varint(data, start)
    if length > len(data) - start:
        raise ArtifactError("a section is cut off")
    return data[start : start + length], start + length


def varint(number: int) -> bytes:
    """Return a number in base 128, low digits first; the high bit says that more digits follow."""
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def read_varint(data: bytes | bytearray, start: int) -> tuple[int, int]:
    """Return the number that starts at `start`, and where it ends."""
    number = 0
    for place, digit in enumerate(data[start : start + 9]):
        number |= (digit & 127) << (7 * place)
        if digit < 128:
            return number, start + place + 1
    raise ArtifactError("a number does not end")


def _model(counts: NDArray[np.int64]) -> Any:
    # float64 holds counts and their sums exactly; `perfect` would search for another rounding
    return constriction.stream.model.Categorical(counts.astype(np.float64), perfect=False)


def _encode_codes(bits: Bits, values: Bits, counts: NDArray[np.int64]) -> bytes:
    if len(values) == 1:
        return b""
    model, encoder = _model(counts), ranges.encoder()
    for start in range(0, bits.size, _CHUNK):
        encoder.encode(_ranks(values, bits[start : start + _CHUNK]), model)
    return ranges.finished(encoder)


def _ranks(values: Bits, bits: Bits) -> NDArray[np.int32]:
    """Return the position of each element among the values."""
    if bits.itemsize > 2:
        return np.searchsorted(values, bits).astype(np.int32)
    ranks = np.zeros(256**bits.itemsize, np.int32)
    ranks[values] = np.arange(len(values))
    return ranks[bits]


def _read_head(part: bytes | bytearray, itemsize: int, size: int) -> tuple[Bits, NDArray[np.int64], bytes]:
    number, start = read_varint(part, 0)
    end = start + number * itemsize
    if not 1 <= number <= min(MOST_VALUES, size) or end > len(part):
        raise ArtifactError(f"{number} distinct values do not fit {size} elements in {len(part)} bytes")
    values = np.frombuffer(bytes(part[start:end]), stored(itemsize))
    counts = []
    for _ in range(number - 1):
        count, end = read_varint(part, end)
        counts.append(count)
    counts.append(size - sum(counts))
    if min(counts) < 1 or not (values[1:] > values[:-1]).all():
        raise ArtifactError("the histogram does not fit the tensor")
    return values, np.array(counts, np.int64), bytes(part[end:])
