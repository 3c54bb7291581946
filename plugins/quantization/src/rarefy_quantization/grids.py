"""Evenly spaced values with zero among them, and the units of a weight that have a spacing each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

STEP_BITS = 16
"""Significant bits of a step size: with codes of 8 bits, step times code has 24 and is exact in float32."""


def round_step(step: torch.Tensor) -> torch.Tensor:
    """Return the nearest float32 with 16 significant bits."""
    # in double precision, since a subnormal would lose its scale on the way
    fraction, exponent = torch.frexp(step.double())
    return torch.ldexp((fraction * 2**STEP_BITS).round(), exponent - STEP_BITS).float()


@dataclass(frozen=True)
class Units:
    """How a weight falls into units: the whole of it, its rows, or parts of its rows.

    A row is all that makes one output, as in `weight.flatten(1)`.
    """

    shape: tuple[int, ...]
    columns: int
    """Entries of a row, or of the whole."""
    size: int
    """Entries of a unit; the last of a row is filled up with zeros."""

    @classmethod
    def of(cls, shape: torch.Size, granularity: str, group_size: int) -> Units:
        """Return the units of a weight of `shape`; `granularity` is `tensor`, `channel` or `group`."""
        if granularity == "tensor":
            return cls(tuple(shape), shape.numel(), shape.numel())
        columns = math.prod(shape[1:])
        return cls(tuple(shape), columns, min(group_size, columns) if granularity == "group" else columns)

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.shape) // self.columns * -(-self.columns // self.size)

    def split(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as `(units, size)`, in at least single precision."""
        rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).reshape(-1, self.columns)
        return F.pad(rows, (0, -self.columns % self.size)).reshape(-1, self.size)

    def join(self, units: torch.Tensor) -> torch.Tensor:
        """Undo `split`, precision aside."""
        padded = self.columns + -self.columns % self.size
        return units.reshape(-1, padded)[:, : self.columns].reshape(self.shape)


@dataclass(frozen=True)
class Grid:
    """The values step * code for the integers code from low to high, each `(units, 1)`; low <= 0 <= high."""

    step: torch.Tensor
    """float32 of 16 significant bits."""
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def between(cls, least: torch.Tensor, most: torch.Tensor, bits: int, symmetric: bool) -> Grid:
        """Return the narrowest grid that reaches `least` <= 0 and `most` >= 0, `(units, 1)`.

        An affine grid may miss one by half a step, as its zero point is rounded. A unit of zeros has the step 1.
        """
        codes = 2**bits
        if symmetric:
            low, high = -codes // 2, codes // 2 - 1
            step = _step((least / low).maximum(most / high))
            return cls(step, torch.full_like(step, low), torch.full_like(step, high))
        step = _step((most - least) / (codes - 1))
        lowest = (least / step).round().float()
        return cls(step, lowest, lowest + (codes - 1))

    def codes(self, units: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes, as floats; halves go to the even one."""
        return (units / self.step).round().maximum(self.low).minimum(self.high) + 0.0  # -0.0 would be one more code

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        """Return the nearest values of the grid."""
        return self.codes(units) * self.step

    def error(self, units: torch.Tensor) -> torch.Tensor:
        """Return the sum of squared errors of snapping, `(units, 1)`, in double precision."""
        return (self.snap(units) - units).square().sum(-1, keepdim=True, dtype=torch.float64)


def _step(step: torch.Tensor) -> torch.Tensor:
    rounded = round_step(step)
    return torch.where(rounded > 0, rounded, 1)
