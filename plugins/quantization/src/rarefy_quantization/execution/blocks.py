"""Weights as 4-bit integers in blocks of inputs, as the operator MatMulNBits takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rarefy.artifact.grids import GROUPS, candidates

from rarefy_quantization.grids import Grid

Array = NDArray[Any]
CODES = 16


@dataclass(frozen=True)
class Blocks:
    """A weight `(out, inputs)` as scales times (codes - zeros), each block of `size` inputs of a row with its own.

    The last block of a row is filled up with codes of zero.
    """

    size: int
    codes: Array
    """uint8 from 0 to 15, `(out, blocks, size)`."""
    scales: Array
    """float32, `(out, blocks)`."""
    zeros: Array
    """uint8 from 0 to 15, `(out, blocks)`."""
    found: bool
    """Whether the weight consisted of these integers already."""

    def packed(self) -> Array:
        """Return two codes per byte, the first in the low bits, `(out, blocks, size / 2)`."""
        return _pairs(self.codes)

    def packed_zeros(self) -> Array:
        """Return two zero points per byte, `(out * ceil(blocks / 2),)`."""
        padded = np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2)))
        return _pairs(padded).reshape(-1)


def blocks_of(rows: Array, size: int) -> Blocks:
    """Return the blocks of a weight: those it has where its groups or rows lie on grids of 16 values, else new ones.

    New blocks have `size` inputs and codes from -8 to 7.
    """
    found = _found(rows)
    if found is not None:
        return found
    split = _split(rows, size)
    units = torch.tensor(split.reshape(-1, size))
    grid = Grid.between(units.amin(1, True).clamp(max=0), units.amax(1, True).clamp(min=0), 4, symmetric=True)
    return _assembled(grid.codes(units).numpy().reshape(split.shape), grid.step.numpy().reshape(split.shape[:2]), False)


def _found(rows: Array) -> Blocks | None:
    """Return the coarsest blocks of which each lies on a grid of 16 values with zero among them; None without any."""
    if rows.shape[1] < 2:
        return None
    for grid, steps in candidates(np.ascontiguousarray(rows).reshape(-1), rows.shape[1]):
        block = grid.group if grid.group < rows.shape[1] else max(GROUPS)
        spread = grid.spread(steps).reshape(rows.shape)
        codes = _split(rows / spread, block)
        if (codes.max(2).clip(min=0) - codes.min(2).clip(max=0) < CODES).all():
            return _assembled(codes, np.ascontiguousarray(spread[:, ::block]), True)
    return None


def _assembled(codes: Array, scales: Array, found: bool) -> Blocks:
    """Return blocks of signed codes: 8 stands for zero where that does, else the least code gets 0."""
    low, high = codes.min(2), codes.max(2)
    zeros = np.where((low >= -8) & (high <= 7), 8, -np.minimum(low, 0))
    whole = (codes + zeros[:, :, None]).astype(np.uint8)
    return Blocks(codes.shape[2], whole, scales.astype(np.float32), zeros.astype(np.uint8), found)


def _split(rows: Array, size: int) -> Array:
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))
    return padded.reshape(len(rows), -1, size)


def _pairs(values: Array) -> Array:
    return (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8)
