"""The path through the trellis with the least squared error and bits (Viterbi 1967)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rarefy.trellis import NEXT, QUANTIZER, Integers, multiples

Floats = NDArray[np.float64]

_SOURCES = np.array([[(s, p) for s in range(len(NEXT)) for p in (0, 1) if NEXT[s, p] == t] for t in range(len(NEXT))])
"""(8, 2, 2): the two states, each with a parity, that lead to a state."""
_FROM, _PARITY = _SOURCES[..., 0], _SOURCES[..., 1]
_LARGEST = 16383


@dataclass(frozen=True)
class Prices:
    """What indices cost with either quantizer."""

    cost: Floats
    """(2, n): the cost of index i - n // 2."""

    def of(self, quantizer: int, indices: Integers) -> Floats:
        """Return the cost of indices; those beyond the table cost as much as its ends."""
        half = self.cost.shape[1] // 2
        found: Floats = self.cost[quantizer, np.clip(indices, -half, half) + half]
        return found

    @classmethod
    def measured(cls, indices: Integers, quantizers: Integers, alive: NDArray[np.bool_], price: float) -> Prices:
        """Return `price` times the bits that an ideal coder takes for indices as frequent as these."""
        half = int(np.abs(indices).max()) + 2
        table = np.empty((2, 2 * half + 1))
        for quantizer in (0, 1):
            used = indices[alive & (quantizers == quantizer)] + half
            counts = np.bincount(used, minlength=2 * half + 1) + 0.05  # what did not occur is dear, not impossible
            table[quantizer] = -price * np.log2(counts / counts.sum())
        return cls(table)


def best_path(units: Floats, alive: NDArray[np.bool_], prices: Prices | None = None) -> tuple[Integers, Integers]:
    """Return the indices of the cheapest paths down the columns of `units`, (rows, width), and their quantizers.

    `units` are weights in steps. A path costs its squared errors and prices. Where `alive` is false, the index is 0.
    """
    rows, width = units.shape
    choices = [_choices(units, alive, quantizer, prices) for quantizer in (0, 1)]
    costs = np.stack([cost for cost, _ in choices], axis=1)  # (rows, quantizer, parity, width)
    total = np.full((len(NEXT), width), np.inf)
    total[0] = 0
    taken = np.empty((rows, len(NEXT), width), np.int8)
    for row in range(rows):
        ways = total[_FROM] + costs[row][QUANTIZER[_FROM], _PARITY]
        taken[row] = ways[:, 1] < ways[:, 0]
        total = ways.min(axis=1)
    return _traced(taken, total.argmin(axis=0), np.stack([index for _, index in choices], axis=1))


def _choices(units: Floats, alive: NDArray[np.bool_], quantizer: int, prices: Prices | None) -> tuple[Floats, Integers]:
    """Return the cheapest index of either parity, (rows, 2, width), after its cost."""
    target = (units + quantizer * np.sign(units)) / 2
    costs, indices = [], []
    for parity in (0, 1):
        near = (2 * np.round((target - parity) / 2) + parity).astype(np.int64).clip(-_LARGEST, _LARGEST)
        inner = np.where(np.abs(near) >= 2, near - 2 * np.sign(near), near)  # often cheaper in bits
        options = np.stack([near, inner])
        cost = (units - multiples(options, np.int64(quantizer))) ** 2
        if prices is not None:
            cost += prices.of(quantizer, options)
        pick = (cost[1] < cost[0]).astype(np.int64)[None]
        dead = 0.0 if parity == 0 else np.inf
        costs.append(np.where(alive, np.take_along_axis(cost, pick, 0)[0], dead))
        indices.append(np.where(alive, np.take_along_axis(options, pick, 0)[0], 0))
    return np.stack(costs, axis=1), np.stack(indices, axis=1)


def _traced(taken: NDArray[np.int8], last: Integers, indices: Integers) -> tuple[Integers, Integers]:
    """Return the indices and quantizers of the paths that end in the states `last`, found from the end."""
    rows, _, width = taken.shape
    found, quantizers = np.empty((rows, width), np.int64), np.empty((rows, width), np.int64)
    columns, state = np.arange(width), last
    for row in range(rows - 1, -1, -1):
        way = taken[row, state, columns]
        parity, state = _PARITY[state, way], _FROM[state, way]
        quantizers[row] = QUANTIZER[state]
        found[row] = indices[row, quantizers[row], parity, columns]
    return found, quantizers
