"""When a schedule prunes during fine-tuning, and how far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rarefy_pruning.weights.masks import cubic


class Schedule(Protocol):
    """A number of updates that come due as fine-tuning goes on."""

    updates: int

    def due(self, progress: float) -> int:
        """Return how many updates are due at `progress` (0 to 1)."""

    def sparsity(self, start: float, end: float, update: int) -> float:
        """Return the sparsity after an update, from 1 on, between those at the start and at the end."""


def _whole(position: float) -> int:
    # a hair more, so that rounding of the progress does not delay an update by a step
    return math.floor(position + 1e-9)


@dataclass(frozen=True)
class Cubic:
    """Fast at first and slower towards the end (Zhu & Gupta 2017, eq. 1)."""

    ramp: float = 0.75
    """Share of the fine-tuning after which all is pruned."""
    updates: int = 50

    def due(self, progress: float) -> int:
        """Return how many of the updates, evenly spread over the ramp, are due."""
        return _whole(min(1.0, progress / self.ramp) * self.updates)

    def sparsity(self, start: float, end: float, update: int) -> float:
        """Return the sparsity of the cubic ramp."""
        return cubic(start, end, update / self.updates)


@dataclass(frozen=True)
class Rounds:
    """Equal parts of the fine-tuning, each after a pruning (Han et al. 2015)."""

    updates: int = 4

    def due(self, progress: float) -> int:
        """Return how many rounds have begun: the first with the first step; the last leaves a part to retrain."""
        return min(self.updates, 1 + _whole(progress * self.updates))

    def sparsity(self, start: float, end: float, update: int) -> float:
        """Return the sparsity at which each round has removed the same share of the weights it found."""
        if start >= end:
            return end
        return 1 - (1 - start) * ((1 - end) / (1 - start)) ** (update / self.updates)


class AtEnd:
    """No pruning while fine-tuning runs."""

    updates = 0

    def due(self, progress: float) -> int:
        """Return 0."""
        return 0

    def sparsity(self, start: float, end: float, update: int) -> float:
        """Return the sparsity at the start."""
        return start
