"""The integers of a weight: those it already consists of, or those that it is rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rarefy.artifact.grids import candidates

from rarefy_quantization.grids import Grid

Array = NDArray[Any]
LOW, HIGH = -128, 127
SMALLEST_SCALE = 1e-30
"""A row with a smaller step is nothing but zeros to a kernel in single precision."""


@dataclass(frozen=True)
class RowCodes:
    """A weight `(out, inputs)` as integers times one scale per row."""

    codes: Array
    """int8."""
    scales: Array
    """float32, `(out,)`, positive."""
    found: bool
    """Whether the weight consisted of these integers already."""


def row_codes(rows: Array, before: Array | None = None) -> RowCodes:
    """Return the codes of a weight, those it has where it lies on a grid of at most 256 values around zero per row.

    `before`, of the same shape, is the weight before each row was multiplied with a number of its own, as a batch norm
    behind the layer does when it is folded in: products are rounded, so that only `before` tells the codes.
    """
    own = _codes(rows)
    if own is not None:
        return _finished(*own, found=True)
    plain = Grid.between(*_ends(rows), 8, symmetric=True)
    codes, scales = plain.codes(torch.tensor(rows)).numpy(), plain.step.numpy()[:, 0]
    folded = None if before is None or before.shape != rows.shape else _folded(rows, before)
    if folded is None:
        return _finished(codes, scales, found=False)
    fits = (folded[0].min(1) >= LOW) & (folded[0].max(1) <= HIGH)  # a negative factor makes 128 of -128
    chosen = np.where(fits[:, None], folded[0], codes), np.where(fits, folded[1], scales)
    return _finished(*chosen, found=bool(fits.all()))


def _codes(rows: Array) -> tuple[Array, Array] | None:
    """Return codes of at most 8 bits and a step for each row, None when the rows are no multiples of steps."""
    if rows.shape[1] < 2:
        return None
    for grid, steps in candidates(np.ascontiguousarray(rows).reshape(-1), rows.shape[1]):
        spread = grid.spread(steps).reshape(rows.shape)
        codes = rows / spread
        if grid.group == grid.width and codes.min() >= LOW and codes.max() <= HIGH:
            return codes, spread[:, 0]
    return None


def _folded(rows: Array, before: Array) -> tuple[Array, Array] | None:
    """Return codes and steps of rows that are multiples of `before`, None when they or its codes are not."""
    own = _codes(before)
    if own is None:
        return None
    squares = np.square(before, dtype=np.float64).sum(1)
    factors = (rows.astype(np.float64) * before).sum(1) / np.where(squares > 0, squares, 1)
    largest = np.abs(rows).max(1, keepdims=True)
    if not (np.abs(rows - factors[:, None] * before) <= 1e-5 * largest).all():
        return None
    return own[0] * np.sign(factors)[:, None], (own[1] * np.abs(factors)).astype(np.float32)


def _finished(codes: Array, scales: Array, found: bool) -> RowCodes:
    kept = scales > SMALLEST_SCALE
    codes = np.where(kept[:, None], codes, 0).astype(np.int8)
    return RowCodes(codes, np.where(kept, scales, 1).astype(np.float32), found)


def _ends(rows: Array) -> tuple[torch.Tensor, torch.Tensor]:
    units = torch.tensor(rows)
    return units.amin(1, keepdim=True).clamp(max=0), units.amax(1, keepdim=True).clamp(min=0)
