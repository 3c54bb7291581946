"""How many units of each group go: scores and goals in, units to remove out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

NARROW = 16
"""Groups of fewer units than this times the multiple are not rounded: benchmarks/pruning/widths.py says why."""
_STEPS = 24


@dataclass(frozen=True)
class Pool:
    """Scores of groups that compete with each other."""

    scores: Mapping[str, torch.Tensor]
    """By group, `(units,)`."""
    orders: Mapping[str, torch.Tensor]
    """Units of each group in the order in which they go."""


def pools(
    scores: Mapping[str, torch.Tensor],
    kinds: Mapping[str, Hashable] | None,
    orders: Mapping[str, torch.Tensor] | None = None,
) -> list[Pool]:
    """Return the groups pooled by kind, each alone when there are no kinds; units go by score unless told otherwise."""
    if orders is None:
        orders = {name: score.argsort(stable=True) for name, score in scores.items()}
    by_kind: dict[Hashable, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, score in scores.items():
        by_kind[name if kinds is None else kinds[name]][name] = score
    return [Pool(members, {name: orders[name] for name in members}) for members in by_kind.values()]


def lowest(pool: Pool, amount: float, least: float, round_to: int) -> dict[str, torch.Tensor]:
    """Return the units with the lowest scores, a share `amount` of the pool, by group.

    Each group keeps a share `least`, and one unit. Widths are then rounded up.
    """
    names = list(pool.scores)
    flat = torch.cat([pool.scores[name] for name in names])
    count = min(round(amount * len(flat)), len(flat) - 1)
    # stable, so that equal scores go in the order of their units
    ranked = torch.zeros(len(flat), dtype=torch.bool)
    ranked[flat.argsort(stable=True)[:count]] = True
    gone = {}
    for name, chosen in zip(names, ranked.split([len(pool.scores[name]) for name in names]), strict=True):
        units = len(chosen)
        kept = rounded(max(units - int(chosen.sum()), math.ceil(least * units), 1), units, round_to)
        gone[name] = pool.orders[name][: units - kept].sort().values
    return gone


def rounded(kept: int, units: int, multiple: int) -> int:
    """Return a width rounded up to a multiple; narrow groups are left as they are."""
    if units < NARROW * multiple:
        return kept
    return min(units, math.ceil(kept / multiple) * multiple)


def reach(share: float, left: Callable[[float], float]) -> float:
    """Return the smallest amount, to 2^-24, at which no more than `share` is left, by bisection.

    `left(amount)` is the share that is left, falling in the amount. When even the largest amount leaves more, that
    is returned.
    """
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if left(middle) <= share:
            high = middle
        else:
            low = middle
    return high


def normalized(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the scores divided by the mean of each group."""
    return {name: score / score.mean().clamp_min(1e-30) for name, score in scores.items()}


def merged(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return all removals in one."""
    return {name: units for part in parts for name, units in part.items() if len(units)}
