"""Lossless coding of integers that are mostly zero, such as the codes of pruned weights.

A part is, as base-128 varints, how many others there are; the least of their distances from zero; twice the number by
which the greatest exceeds it, and one more where the places of the others are coded with contexts (see `masks`); and,
unless all distances are the same, the decay of the first counts (see `adaptive`). Then the words of one range coder:
the places, a bit for each that tells whether it is positive, and the distances less the least with learnt counts.
"""

from __future__ import annotations

import constriction
import numpy as np
from numpy.typing import NDArray

from rarefy.artifact import adaptive, masks, ranges
from rarefy.artifact.codebook import read_varint, varint
from rarefy.artifact.grids import LARGEST_CODE
from rarefy.errors import ArtifactError

Codes = NDArray[np.int32]

_MOST = 0.75
"""Share of others from which on zeros are no longer coded apart."""


def encode(codes: Codes, width: int) -> bytes | None:
    """Return the coded integers, in rows of `width`, or None when too few are zero or they are too far apart."""
    mask = (codes != 0).reshape(-1, width)
    others = codes[codes != 0]
    if not 0 < others.size <= _MOST * codes.size:
        return None
    distances = np.abs(others)
    least, extent = int(distances.min()), int(np.ptp(distances))
    if extent >= adaptive.MOST_SYMBOLS:
        return None
    related = masks.encode(mask)[0]
    encoder = ranges.encoder()
    masks.write(encoder, mask, bool(related))
    encoder.encode((others > 0).astype(np.int32), _sides())
    head = varint(others.size) + varint(least) + varint(2 * extent + related)
    if not extent:
        return head + ranges.finished(encoder)
    distances = (distances - least).astype(np.uint16)
    usual, parts = adaptive.decay_of(distances, 0), []
    for decay in {usual, usual * 3 // 4, (2 * usual + 255) // 3}:
        own = encoder.clone()
        adaptive.write(own, distances, (extent + 1, 0, decay, 1))
        parts.append(head + varint(decay) + ranges.finished(own))
    return min(parts, key=lambda part: (len(part), part))


def decode(part: bytes | bytearray, rows: int, width: int) -> Codes:
    """Return the integers of a part; raise `ArtifactError` when it is not sound."""
    count, at = read_varint(part, 0)
    least, at = read_varint(part, at)
    number, at = read_varint(part, at)
    extent, related = number // 2, bool(number % 2)
    decay, at = read_varint(part, at) if extent else (0, at)
    if not 0 < count <= rows * width:
        raise ArtifactError(f"{count} integers do not lie in {rows * width} places")
    if not 0 < least <= LARGEST_CODE - extent or extent >= adaptive.MOST_SYMBOLS or decay > 255:
        raise ArtifactError(f"no integers lie {least} to {least + extent} from zero with a decay of {decay}")
    with ranges.decoding(part[at:], "codes") as decoder:
        mask = masks.read(decoder, rows, width, count, related).reshape(-1)
        above = decoder.decode(_sides(), count).astype(bool)
        distances = np.full(count, least, np.int32)
        if extent:
            distances += adaptive.read(decoder, count, 1, (extent + 1, 0, decay, 1))
    codes = np.zeros(rows * width, np.int32)
    codes[mask] = np.where(above, distances, -distances)
    return codes


def _sides() -> object:
    return constriction.stream.model.Uniform(2)
