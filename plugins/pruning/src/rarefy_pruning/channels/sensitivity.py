"""What removing units costs, group by group: the increase of the loss when the lowest-scored are masked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rarefy.dependencies import Dependencies, mask
from rarefy.dependencies.overview import LEVELS
from rarefy.progress import track
from rarefy.sensitivity import Increase
from torch import nn

from rarefy_pruning.channels.budget import Left, saving


class Sensitivity:
    """Curves of the loss over the share of a group's units that are masked, those with the lowest scores first."""

    def __init__(
        self, model: nn.Module, found: Dependencies, scores: Mapping[str, torch.Tensor], increase: Increase
    ) -> None:
        self.orders = {name: score.argsort(stable=True) for name, score in scores.items()}
        self.increases = {
            name: {
                round(level * len(order)): increase(mask(model, found, {name: order[: round(level * len(order))]}))
                for level in LEVELS
            }
            for name, order in track(self.orders.items(), "masking groups", len(self.orders))
        }
        """By group: number of masked units to increase of the loss."""

    def costs(self, left: Left | None) -> dict[str, torch.Tensor]:
        """Return what each unit costs, `(units,)`: the increase of the loss per unit of the measure that it saves.

        Taking the cheapest units first then reaches any budget at the least sum of increases, as far as the increases
        of several groups add up: the curves' lower convex hulls make the greedy choice the best one.
        """
        found = {}
        for name, order in self.orders.items():
            slopes = hull(self.increases[name], len(order)) / (1.0 if left is None else saving(left, name, order))
            found[name] = torch.empty_like(slopes).scatter_(0, order, slopes)
        return found


def hull(points: Mapping[int, float], units: int) -> torch.Tensor:
    """Return the slopes of the lower convex hull of a curve from (0, 0), one per unit; the last goes on to the end."""
    curve = [(0, 0.0), *((count, max(value, 0.0)) for count, value in sorted(points.items()) if count)]
    slopes = torch.zeros(units)
    at = 0
    while at < len(curve) - 1:
        steepness, to = min((_slope(curve[at], curve[i]), -i) for i in range(at + 1, len(curve)))
        slopes[curve[at][0] :] = steepness
        at = -to
    return slopes


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
