"""Which weights stay: scores in, masks out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


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


def pattern_mask(scores: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """Return a boolean mask of the `keep` largest of each `of` consecutive scores along dimension 1.

    Scores are `(out, in)` or `(out, in, *kernel)`: a block is `of` consecutive input channels at one place of the
    kernel, so that blocks lie along the dimension that a product sums over. When `of` does not divide `in`, the last
    block is shorter and keeps as many, or all of its scores if it has fewer: it counts as filled up with zeros. Of
    equal scores the ones that come first are kept.
    """
    inputs = scores.shape[1]
    padded = nn.functional.pad(scores.movedim(1, -1), (0, -inputs % of), value=-torch.inf)
    blocks = padded.unflatten(-1, (-1, of))
    # padding comes last, and a stable sort leaves it behind scores that are as low
    best = blocks.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True)
    return mask.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def cubic(start: float, end: float, position: float) -> float:
    """Return the sparsity at `position` (0 to 1) of a cubic ramp (Zhu & Gupta 2017, eq. 1)."""
    return end + (start - end) * (1 - position) ** 3
