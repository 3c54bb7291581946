"""Find the steps of which a tensor's elements are whole multiples, for elements that share one in lines and groups.

A finite float is an odd integer times a power of two, and so is the largest float that divides several of them: the
greatest common divisor of the odd integers times the least of the powers (zeros divide by anything). It is never finer
than the floats themselves, so it and all quotients that are small integers are floats of the same type, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

LARGEST_CODE = 32767
GROUPS = (32, 64, 128)
# Below it arithmetic may flush to zero (torch.set_flush_denormal), so no step and no product lies there.
SMALLEST_STEP = float(np.finfo(np.float32).tiny)
_SAMPLE = 64
_CHUNK = 1 << 11
_OF_ZERO = 1 << 10


@dataclass(frozen=True)
class Grid:
    """Which elements share a step: the flat tensor is cut into lines of `width`, each into groups of `group`."""

    width: int
    group: int

    @property
    def per_line(self) -> int:
        """Number of groups in a line; the last may be shorter."""
        return -(-self.width // self.group)

    def spread(self, steps: NDArray[Any]) -> NDArray[Any]:
        """Return the step of each element, given those of all groups."""
        lengths = np.full(self.per_line, self.group)
        lengths[-1] = self.width - self.group * (self.per_line - 1)
        return np.repeat(steps.reshape(-1, self.per_line), lengths, axis=1).reshape(-1)


def candidates(values: Floats, width: int) -> Iterator[tuple[Grid, Floats]]:
    """Yield the grids, coarse to fine, that make every element a small multiple of its group's step, with the steps."""
    unit = min(width, GROUPS[0])
    units = _units(values, width, unit)
    if not _Divisors.of(units[:: max(1, len(units) // _SAMPLE)]).allowed():
        return
    found = _Divisors.of(units)
    if not found.allowed():
        return
    for grid in _grids(values.size, width):
        per_line = len(units) // (values.size // grid.width)
        merged = found.merged(per_line, per_line if grid.group == grid.width else grid.group // unit)
        if merged.allowed():
            yield grid, merged.steps()


@dataclass(frozen=True)
class _Divisors:
    """The greatest common divisors of sets of floats, `odd * 2**power`, and the largest magnitude of each set."""

    odd: Integers
    power: Integers
    largest: Floats

    @classmethod
    def of(cls, units: Floats) -> _Divisors:
        """Return those of the rows of a matrix."""
        chunks = [cls._of(units[start : start + _CHUNK]) for start in range(0, len(units), _CHUNK)]
        return cls(*(np.concatenate(arrays) for arrays in zip(*chunks, strict=True)))

    @staticmethod
    def _of(units: Floats) -> tuple[Integers, Integers, Floats]:
        magnitude = np.abs(units)
        bits = magnitude.view(np.int32)
        exponent = bits >> 23
        mantissa = (bits & 0x7FFFFF) | ((exponent > 0).astype(np.int32) << 23)
        last = (mantissa & -mantissa).astype(np.float32).view(np.int32) >> 23  # its exponent counts the zeros below it
        zeros = np.maximum(last - 127, 0)
        power = np.where(mantissa == 0, np.int32(_OF_ZERO), np.maximum(exponent, 1) - 150 + zeros)
        return np.gcd.reduce(mantissa >> zeros, axis=1), power.min(axis=1), magnitude.max(axis=1)

    def merged(self, per_line: int, per_group: int) -> _Divisors:
        """Return those of groups of `per_group` sets, in lines of `per_line` sets."""
        starts = np.arange(0, per_line, per_group)

        def merge(operation: np.ufunc, array: NDArray[Any]) -> NDArray[Any]:
            merged: NDArray[Any] = operation.reduceat(array.reshape(-1, per_line), starts, axis=1).reshape(-1)
            return merged

        return _Divisors(merge(np.gcd, self.odd), merge(np.minimum, self.power), merge(np.maximum, self.largest))

    def allowed(self) -> bool:
        """Tell whether all sets are finite, and small multiples of a step that is not too small."""
        steps = self._exact()
        normal = (steps >= SMALLEST_STEP) | (self.largest == 0)
        return bool((normal & (self.largest <= LARGEST_CODE * steps)).all())

    def steps(self) -> Floats:
        """Return the divisors as floats; sets of zeros get one that occurs anyway."""
        steps = self._exact().astype(np.float32)
        some = steps[steps > 0]
        return np.where(steps > 0, steps, some[0] if some.size else np.float32(1))

    def _exact(self) -> NDArray[np.float64]:
        return np.ldexp(self.odd.astype(np.float64), np.where(self.odd == 0, 0, self.power))


def _grids(size: int, width: int) -> list[Grid]:
    shared = [Grid(size, size)] + [Grid(width, width)] * (width < size)
    return shared + [Grid(width, group) for group in reversed(GROUPS) if group < width]


def _units(values: Floats, width: int, unit: int) -> Floats:
    """Return the lines cut into rows of `unit`, the last of each filled up with zeros, which every step divides."""
    missing = -width % unit
    lines = values.reshape(-1, width)
    return (np.pad(lines, ((0, 0), (0, missing))) if missing else lines).reshape(-1, unit)
