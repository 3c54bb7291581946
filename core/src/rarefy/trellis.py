"""The trellis of dependent quantization: which of two quantizers comes next follows from the parities so far.

The values are whole multiples of a step: quantizer 0 takes the even ones, quantizer 1 the odd ones and zero. Each of
eight states has one of the two, and the parity of an index leads to the next state, so that a sequence may use all
multiples while an index tells only half of them apart (trellis-coded quantization, Marcellin & Fischer 1990, on the
union quantizers of Joshi, Crump & Fischer 1995; zero in both of them, and signs folded). Sequences are the columns of
a matrix, all starting in state 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

NEXT = np.array([[0, 1], [3, 2], [5, 4], [6, 7], [1, 0], [2, 3], [4, 5], [7, 6]])
"""(8, 2): the state after each state and parity of the index."""
QUANTIZER = np.arange(8) % 2
"""(8,): the quantizer of each state."""
_SHORTEST = 64


def multiples(indices: Integers, quantizers: Integers) -> Integers:
    """Return the multiples of the step that indices stand for: 2 k, or 2 k - sgn(k)."""
    return 2 * indices - quantizers * np.sign(indices)


def rows(shape: tuple[int, ...]) -> int:
    """Return into how many rows a tensor is reshaped, so that sequences have at least 64 elements where they can.

    They run along the first dimension, and where that is shorter, through parts of each of its indices too.
    """
    first, size = (shape[0] if shape else 1), int(np.prod(shape, dtype=np.int64))
    width = size // first if first else 1
    return next((first * part for part in range(1, width) if width % part == 0 and first * part >= _SHORTEST), size)


class States:
    """The states of all columns, as rows of indices come."""

    number = 2

    def __init__(self, width: int) -> None:
        self._states = np.zeros(width, np.int64)

    def classes(self) -> Integers:
        """Return the quantizer of each column's next element."""
        quantizers: Integers = QUANTIZER[self._states]
        return quantizers

    def advance(self, indices: NDArray[Any]) -> None:
        """Take the indices of the next row."""
        self._states = NEXT[self._states, indices & 1]


def indices(values: Integers) -> Integers | None:
    """Return the index of each of the multiples (rows, width), or None when no path leads through them."""
    states = States(values.shape[1])
    found = np.empty_like(values)
    for row, out in zip(values, found, strict=True):
        quantizers = states.classes()
        if ((row & 1) != quantizers)[row != 0].any():
            return None
        out[:] = (row + quantizers * np.sign(row)) // 2
        states.advance(out)
    return found


def values(found: Integers) -> Integers:
    """Return the multiples of the step of indices (rows, width)."""
    states = States(found.shape[1])
    multiple = np.empty_like(found)
    for row, out in zip(found, multiple, strict=True):
        out[:] = multiples(row, states.classes())
        states.advance(row)
    return multiple
