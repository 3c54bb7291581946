"""Lossless coding of tensors that trellis-coded quantization left: multiples of one step along a path of the trellis.

A part is the bits of the step; as a base-128 varint how far the lowest index is below 0; and what `adaptive` makes of
the indices less that one, with the quantizer that the path leads to as their context.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from rarefy import trellis
from rarefy.artifact import adaptive
from rarefy.artifact.bits import Bits, elements, stored
from rarefy.artifact.codebook import read_varint, varint
from rarefy.artifact.floats import ITEMSIZES, checked, narrowed, products, widened
from rarefy.artifact.grids import LARGEST_CODE, candidates
from rarefy.errors import ArtifactError

_MOST_ROWS = 1 << 16


def encode(bits: Bits, dtype: str, shape: tuple[int, ...]) -> bytes | None:
    """Return the coded elements, or None when they are no path of the trellis or would not become smaller."""
    rows = trellis.rows(shape)
    if dtype not in ITEMSIZES or len(shape) < 2 or bits.size == 0 or rows > _MOST_ROWS:
        return None
    floats = widened(bits, dtype)
    steps = next((steps for grid, steps in candidates(floats, bits.size) if grid.group == bits.size), None)
    if steps is None or (bits == 1 << (8 * bits.itemsize - 1)).any():  # -0.0 is no multiple
        return None
    found = trellis.indices((floats / steps[0]).astype(np.int64).reshape(rows, -1))
    if found is None:
        return None
    lowest = int(found.min())
    walk = partial(_Shifted, found.shape[1], lowest)
    coded = adaptive.encode(found - lowest, found.shape[1], max(0, -lowest), walk) if lowest <= 0 else None
    return None if coded is None else narrowed(steps[:1], dtype).tobytes() + varint(-lowest) + coded


def decode(part: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Bits:
    """Return the elements of a part; raise `ArtifactError` when it is not sound."""
    rows, size, itemsize = trellis.rows(shape), elements(shape), ITEMSIZES.get(dtype, 0)
    if not itemsize or len(shape) < 2 or not size or rows > _MOST_ROWS or len(part) < itemsize:
        raise ArtifactError(f"{dtype} of the shape {shape} in {len(part)} bytes has no trellis")
    step = checked(widened(np.frombuffer(bytes(part[:itemsize]), stored(itemsize)), dtype))
    below, at = read_varint(part, itemsize)
    if below > LARGEST_CODE:
        raise ArtifactError(f"the indices exceed {LARGEST_CODE}")
    symbols = adaptive.decode(part[at:], size, size // rows, _Shifted(size // rows, -below))
    found = trellis.values(symbols.reshape(rows, -1).astype(np.int64) - below).reshape(-1)
    lowest = int(found.min())
    table = np.arange(lowest, int(found.max()) + 1).astype(np.float64)
    return products(table, found - lowest, np.broadcast_to(step, size), dtype)


class _Shifted(trellis.States):
    """The states as symbols come, which are indices less the lowest one."""

    def __init__(self, width: int, lowest: int) -> None:
        super().__init__(width)
        self._lowest = lowest

    def advance(self, indices: adaptive.Symbols) -> None:
        super().advance(indices.astype(np.int64) + self._lowest)
