"""Floats as numbers and as bits: the widths that codings of multiples know, and exact products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.artifact.bits import Bits, stored
from rarefy.artifact.grids import SMALLEST_STEP, Floats
from rarefy.errors import ArtifactError

ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_CHUNK = 1 << 16


def widened(bits: Bits, dtype: str) -> Floats:
    """Return the floats of some bits as float32, which holds all of them exactly."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    floats: NDArray[Any] = bits.view(f"<f{bits.itemsize}")
    return floats.astype(np.float32, copy=False)


def narrowed(values: Floats, dtype: str) -> Bits:
    """Return the bits of float32 numbers in another type; numbers that it lacks come out different."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(stored(2))
    itemsize = ITEMSIZES[dtype]
    return values.astype(f"<f{itemsize}", copy=False).view(stored(itemsize))


def products(codes: NDArray[np.float64], symbols: NDArray[Any], steps: Floats, dtype: str) -> Bits:
    """Return the bits of `codes[symbols] * steps`; raise `ArtifactError` where the type lacks the product."""
    bits = np.empty(symbols.size, stored(ITEMSIZES[dtype]))
    for start in range(0, symbols.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        exact = codes[symbols[chunk]] * steps[chunk]  # 16 and 24 bits give 40, which float64 has
        with np.errstate(over="ignore"):
            bits[chunk] = narrowed(exact.astype(np.float32), dtype)
        if not (widened(bits[chunk], dtype) == exact).all():
            raise ArtifactError(f"an element is no {dtype}")
    return bits


def checked(steps: Floats) -> Floats:
    """Return steps; raise `ArtifactError` unless all are positive numbers."""
    if not (np.isfinite(steps) & (steps >= SMALLEST_STEP)).all():
        raise ArtifactError("a step is not a positive number")
    return steps
