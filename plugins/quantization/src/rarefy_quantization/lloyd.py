"""One-dimensional k-means on sorted values, where a cluster is a slice and its sums are differences of prefix sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(ordered: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return centroids spread evenly from the least to the greatest value (Deep Compression, section 3.2)."""
    return torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=ordered.dtype, device=ordered.device)


def density(ordered: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return the quantiles in the middle of `count` parts of equal weight (Deep Compression, section 3.2)."""
    places = (torch.arange(count, device=ordered.device) + 0.5) * ordered.numel() / count
    return ordered[places.long()]


def random(ordered: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return randomly chosen values (Forgy)."""
    places = torch.randperm(ordered.numel(), generator=generator)[:count]
    return ordered[places.to(ordered.device)].sort().values


INITS = {"linear": linear, "density": density, "random": random}


def nearest(values: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return for each value the index of the nearest of the ascending `centroids`, of two equally near the lower."""
    return torch.bucketize(values, _middles(centroids))


def lloyd(
    ordered: torch.Tensor, start: torch.Tensor, rounds: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the centroids, ascending, that Lloyd's iterations reach from `start`.

    `ordered` is ascending, float64, and has more than `start.numel()` distinct values; `importance` > 0 weighs the
    squared error of each (Choi et al. 2017, eq. 11 and 12: which centroid is nearest does not depend on it). At the end
    each centroid is the mean of the values nearest to it, unless `rounds` ran out. A centroid that lost all its values
    comes back by splitting the cluster with the largest squared error at its mean.
    """
    count, centroids, before = start.numel(), start, None
    weights = torch.ones_like(ordered) if importance is None else importance
    mass, sums, squares = (
        F.pad((weights * power).cumsum(0), (1, 0)) for power in (torch.ones_like(ordered), ordered, ordered.square())
    )
    for _ in range(rounds):
        edges = _edges(ordered, centroids)
        if before is not None and torch.equal(edges, before):
            break
        before = edges
        filled = torch.unique_consecutive(edges)
        centroids = sums[filled].diff() / mass[filled].diff()
        if centroids.numel() < count:
            errors = squares[filled].diff() - centroids.square() * mass[filled].diff()
            centroids = _split_worst(ordered, mass, sums, filled, centroids, errors, count)
    return centroids


def _middles(centroids: torch.Tensor) -> torch.Tensor:
    return (centroids[1:] + centroids[:-1]) / 2


def _edges(ordered: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the `k + 1` places at which `ordered` falls apart into the centroids' clusters."""
    inner = torch.searchsorted(ordered, _middles(centroids), right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), ordered.numel())])


def _split_worst(
    ordered: torch.Tensor,
    mass: torch.Tensor,
    sums: torch.Tensor,
    edges: torch.Tensor,
    centroids: torch.Tensor,
    errors: torch.Tensor,
    count: int,
) -> torch.Tensor:
    first, last = edges[:-1], edges[1:]
    errors = errors.masked_fill(ordered[first] == ordered[last - 1], -torch.inf)
    worst = errors.argsort(descending=True, stable=True)[: count - centroids.numel()]
    worst = worst[errors[worst] > -torch.inf]
    # a cut inside the slice, also where rounding puts the mean beyond its values
    cuts = torch.searchsorted(ordered, centroids[worst], right=True)
    cuts = cuts.maximum(first[worst] + 1).minimum(last[worst] - 1)
    edges = torch.cat([edges, cuts]).sort().values
    return sums[edges].diff() / mass[edges].diff()
