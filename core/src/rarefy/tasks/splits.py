"""Setting a part of the samples aside, each class in proportion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from rarefy.errors import RecipeError


def split_indices(labels: torch.Tensor, shares: Sequence[float], seed: int) -> list[torch.Tensor]:
    """Return disjoint random index sets with the given shares of all samples and, as near as possible, of every class.

    `labels` are `(samples,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.empty(len(labels), dtype=torch.float64)
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        ranks[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # cutting all classes at one rank takes from each in proportion; where ranks are equal, chance decides
    order = torch.randperm(len(labels), generator=generator)
    order = order[ranks[order].argsort(stable=True)]
    edges = [round(sum(shares[:i]) * len(labels)) for i in range(len(shares) + 1)]
    return [order[start:end].sort().values for start, end in pairwise(edges)]


def set_aside(data: Dataset[Any], share: float, seed: int, split: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return the data set without a share of its samples, and that share; raise `RecipeError` when one is empty."""
    parts = split_indices(_classes(data), [1 - share, share], seed)
    if any(len(part) == 0 for part in parts):
        raise RecipeError(
            f"{len(parts[0]) + len(parts[1])} samples are too few to set {share:.0%} aside for the split {split!r}; "
            f"give `{split}` yourself"
        )
    kept, aside = (_part(data, part) for part in parts)
    return kept, aside


def _classes(data: Dataset[Any]) -> torch.Tensor:
    """Return the labels of a data set that knows one for each sample, and one class for all samples otherwise."""
    if isinstance(data, Subset):
        return _classes(data.dataset)[torch.as_tensor(data.indices)]
    if isinstance(data, TensorDataset):
        known = data.tensors[1] if len(data.tensors) > 1 else None
    else:
        known = getattr(data, "targets", None)
    labels = None if known is None else torch.as_tensor(known)
    return torch.zeros(len(data)) if labels is None or labels.dim() != 1 else labels  # type: ignore[arg-type]


def _part(data: Dataset[Any], indices: torch.Tensor) -> Dataset[Any]:
    if isinstance(data, TensorDataset):
        return TensorDataset(*(tensor[indices] for tensor in data.tensors))
    return Subset(data, indices.tolist())
