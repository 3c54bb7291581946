"""How far outputs move, and how long they take, in figures and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from rarefy.measure import Latency
from torch.utils._pytree import tree_leaves


class Comparison:
    """Sums over outputs and their differences."""

    def __init__(self) -> None:
        self.squares = self.sums = self.differences = 0.0
        self.count = self.rows = self.same = 0

    def add(self, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
        """Add the outputs of a batch."""
        for one, other in zip(expected, found, strict=True):
            one, other = one.double(), other.double()
            self.squares += float(one.square().sum())
            self.sums += float(one.sum())
            self.differences += float((one - other).square().sum())
            self.count += one.numel()
        if len(expected) == 1 and expected[0].dim() == 2:
            self.rows += len(expected[0])
            self.same += int((expected[0].argmax(1) == found[0].argmax(1)).sum())

    def error(self) -> float:
        """Return the root of the mean squared difference over the standard deviation of the outputs."""
        variance = self.squares - self.sums**2 / max(self.count, 1)
        if self.differences == 0:
            return 0.0
        return math.sqrt(self.differences / variance) if variance > 0 else math.inf

    def agreement(self) -> float | None:
        """Return how often the largest output of a sample is the same, None without samples of one row."""
        return self.same / self.rows if self.rows else None


def floats(outputs: object) -> list[torch.Tensor]:
    """Return the floating-point tensors among nested outputs."""
    return list(_floating(outputs))


def _floating(outputs: object) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf


def in_words(timed: Latency) -> str:
    """Return how much faster, or SLOWER, a model is than its original."""
    words = rate_in_words(timed.speed_up)
    return f"{words} ({timed.low:.2f} to {timed.high:.2f})" if timed.speed_up >= 1 else words


def rate_in_words(speed_up: float) -> str:
    """Return a speed-up in words."""
    return f"{speed_up:.2f}x faster" if speed_up >= 1 else f"{1 / speed_up:.2f}x SLOWER"
