"""Which weights compete with each other, and how many of them stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rarefy.weights import LayerWeight

from rarefy_pruning.weights.masks import keep_largest, pattern_mask


@dataclass(frozen=True)
class Budget:
    """Weights that are pruned to a common sparsity, the lowest scores of all first."""

    weights: Sequence[LayerWeight]
    amount: float
    """Share of zeros at the end."""

    @property
    def total(self) -> int:
        """Number of weights, zeros included."""
        return sum(weight.parameter.numel() for weight in self.weights)

    @property
    def alive(self) -> int:
        """Number of weights that are not zero."""
        return sum(int(weight.parameter.count_nonzero()) for weight in self.weights)

    def kept(self, sparsity: float) -> int:
        """Return how many weights stay at `sparsity`: the nearest number, at least one per layer, none revived."""
        return min(self.alive, max(len(self.weights), self.total - round(sparsity * self.total)))

    def masks(self, scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
        """Return boolean masks of the weights that stay at `sparsity`, given the scores of each layer's weights."""
        return keep_largest(scores, self.kept(sparsity))

    def met(self, sparsity: float) -> bool:
        """Tell whether `sparsity` asks for no more zeros than there are."""
        alive = [weight.parameter != 0 for weight in self.weights]
        masks = self.masks([nonzero.float() for nonzero in alive], sparsity)
        return not any(bool((nonzero & ~mask).any()) for nonzero, mask in zip(alive, masks, strict=True))

    def why_unchanged(self, weight: LayerWeight) -> str:
        """Return the reason why a layer of this budget loses nothing."""
        if int(weight.parameter.count_nonzero()) == 1:
            return "its last weight is kept"
        if self.met(self.amount):
            return f"{1 - self.alive / self.total:.1%} of its weights are zero, {self.amount:.1%} are asked for"
        return "none of its weights is among the lowest of all layers"


@dataclass(frozen=True)
class Blocks(Budget):
    """Weights of one layer that are pruned to the same number in each block."""

    of: int | None = None
    """Consecutive input channels in a block; None when each output's weights are a block."""

    def masks(self, scores: Sequence[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
        """Return boolean masks of the weights that stay, at least one in each block."""
        return [self._mask(score, sparsity) for score in scores]

    def why_unchanged(self, weight: LayerWeight) -> str:
        """Return the reason why the layer loses nothing."""
        size = self._size(weight.parameter)
        place = "of its outputs" if self.of is None else f"block of {size} input channels"
        return f"no {place} has more than {self._kept(size, self.amount)} weights that are not zero"

    def _mask(self, score: torch.Tensor, sparsity: float) -> torch.Tensor:
        size = self._size(score)
        blocks = score.flatten(1) if self.of is None else score
        return pattern_mask(blocks, self._kept(size, sparsity), size).view(score.shape)

    def _size(self, weight: torch.Tensor) -> int:
        return self.of or weight[0].numel()

    def _kept(self, size: int, sparsity: float) -> int:
        return max(1, size - round(sparsity * size))
