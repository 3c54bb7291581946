"""The mathematics of merging similar neurons (Srinivas & Babu 2015), on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Merge:
    """One neuron takes over the outgoing weights of another, which is removed."""

    kept: int
    removed: int
    saliency: float
    """Expected squared error up to a constant, <a_j^2> ||W_i - W_j||^2 for j removed."""


def distances(incoming: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each pair of rows, `(units, units)`, float64, infinite on the diagonal.

    `incoming`, `(units, in)`, holds the weights of each unit with its bias as one more coordinate. Equal rows are
    exactly 0 apart.
    """
    points = incoming.double()
    found = torch.cdist(points, points, compute_mode="use_mm_for_euclid_dist").square()
    # products of matrices are 30 times faster than differences, but cancel where rows are nearly equal
    sizes = points.square().sum(1)
    close = (found <= 1e-6 * (sizes + sizes.unsqueeze(1))).triu(1).nonzero()
    for i, j in (pairs.T for pairs in close.split(max(1, _CHUNK // points.shape[1]))):
        found[i, j] = found[j, i] = (points[i] - points[j]).square().sum(1)
    return found.fill_diagonal_(torch.inf)


def ordinary(distance: torch.Tensor, outgoing: torch.Tensor, share: float) -> float:
    """Return the saliency that this share of all pairs (i, j) does not exceed; -1 when that is less than one pair."""
    units = len(distance)
    rank = int(share * units * (units - 1))
    saliencies = outgoing.double().square().mean(0) * distance
    # the diagonal is nan where no one reads the unit, else infinite
    pairs = saliencies[~torch.eye(units, dtype=torch.bool, device=distance.device)]
    return float(pairs.kthvalue(rank).values) if rank else -1.0


def merge_order(distance: torch.Tensor, outgoing: torch.Tensor, count: int, limit: float = math.inf) -> list[Merge]:
    """Return the first `count` merges, each the one of least saliency given those before, none above `limit`.

    `distance` is that of `distances`; `outgoing`, `(rows, units)`, holds the weights by which the next layers read
    each unit. The saliency is not symmetric: only the outgoing weights of the removed unit count.

    For a removed unit j the best i is its nearest neighbour, whatever the outgoing weights are. So only that
    neighbour and the energy <a_j^2> are kept for each j; a merge changes the energy of i alone.
    """
    distance, outgoing = distance.clone(), outgoing.double().clone()
    energy = outgoing.square().mean(0)
    nearest, neighbour = distance.min(0)
    merges: list[Merge] = []
    while len(merges) < min(count, len(distance) - 1):
        # without the condition a unit that no one reads would make 0 * inf of a removed one
        saliency = torch.where(nearest.isfinite(), energy * nearest, torch.inf)
        j = int(saliency.argmin())
        if saliency[j] > limit:
            break
        i = int(neighbour[j])
        merges.append(Merge(i, j, float(saliency[j])))
        outgoing[:, i] += outgoing[:, j]
        energy[i] = outgoing[:, i].square().mean()
        distance[j], nearest[j] = torch.inf, torch.inf
        left = ((neighbour == j) & nearest.isfinite()).nonzero().flatten()
        nearest[left], neighbour[left] = distance[:, left].min(0)
    return merges


def merge_outgoing_(outgoing: torch.Tensor, merges: Iterable[Merge]) -> None:
    """Add the outgoing weights of each removed unit to those of the kept one and clear them, `(..., units)`."""
    for merge in merges:
        outgoing[..., merge.kept] += outgoing[..., merge.removed]
        outgoing[..., merge.removed] = 0
