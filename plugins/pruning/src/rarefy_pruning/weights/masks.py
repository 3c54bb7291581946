"""Which weights stay: scores in, masks out."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def keep_largest(scores: Sequence[torch.Tensor], kept: int) -> list[torch.Tensor]:
    """Return boolean masks, one per tensor, of the `kept` largest scores of all the tensors together.

    The largest score of each tensor is always kept, so `kept` must be at least the number of tensors. Of equal scores
    the ones that come first are kept, so the count is exact and the result the same at every call.
    """
    sizes = [score.numel() for score in scores]
    flat = torch.cat([score.flatten() for score in scores])
    for start, score in zip(_starts(sizes), scores, strict=True):
        flat[start + int(score.argmax())] = torch.inf
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: kept - int(mask.sum())]] = True
    return [part.view(score.shape) for part, score in zip(torch.split(mask, sizes), scores, strict=True)]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def cubic(start: float, end: float, position: float) -> float:
    """Return the sparsity at `position` (0 to 1) of a cubic ramp (Zhu & Gupta 2017, eq. 1)."""
    return end + (start - end) * (1 - position) ** 3
