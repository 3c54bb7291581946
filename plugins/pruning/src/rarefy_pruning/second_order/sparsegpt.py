"""Pruning input by input (SparseGPT)."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Protocol

import torch
from rarefy.hessian import InputHessian, as_rows, inverse_factor
from rarefy.weights import LayerWeight
from torch import nn

from rarefy_pruning.second_order.config import SparseGPTConfig
from rarefy_pruning.second_order.layerwise import Layerwise
from rarefy_pruning.weights.masks import pattern_mask


class Choice(Protocol):
    """Decides which weights stay, block of inputs by block of inputs."""

    widths: list[int]
    """Number of inputs of each block."""

    def keep(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Return the mask of the block that begins at input `start`, of the shape of its `scores`."""


class Share:
    """Removes the lowest scores of all rows of a block together, the same share of the weights in each block."""

    def __init__(self, weight: torch.Tensor, zeros: int, block: int) -> None:
        inputs = weight.shape[-1]
        self.widths = [min(block, inputs - start) for start in range(0, inputs, block)]
        alive = weight.count_nonzero((0, 1)).cumsum(0)
        extra = zeros - int((weight == 0).sum())
        self.due = (extra * alive // alive[-1]).tolist()
        """How many weights that are not zero yet go up to each input."""
        self.done = 0

    def keep(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Keep all but what is zero already and the lowest that are due."""
        due = self.due[start + scores.shape[-1] - 1]
        count = int((scores < 0).sum()) + due - self.done
        self.done = due
        mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[scores.flatten().argsort(stable=True)[:count]] = False
        return mask.view_as(scores)


class Pattern:
    """Keeps the highest `keep` of each `of` consecutive input channels at one place of the kernel."""

    def __init__(self, keep: int, of: int, channels: int, places: int) -> None:
        self.kept, self.of = keep, of
        self.widths = [min(of, channels - start) for start in range(0, channels, of)] * places

    def keep(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        """Choose among the scores of the block."""
        return pattern_mask(scores.flatten(0, 1), self.kept, self.of).view_as(scores)


class SparseGPT(Layerwise[SparseGPTConfig]):
    """One pass over the inputs of a layer: each removed weight is made up for by the inputs that come after it."""

    def zeros(self, weight: LayerWeight, amount: float | None) -> int | None:
        """Return how many weights are to be zero, by `amount` or by `pattern`."""
        if self.config.pattern is None:
            return super().zeros(weight, amount)
        alive = weight.parameter.detach() != 0
        return alive.numel() - int((pattern_mask(alive.float(), *self.config.keep_of) & alive).sum())

    def solve(self, layer: nn.Module, hessian: InputHessian, zeros: int) -> torch.Tensor:
        """Return the rows after the pass."""
        channels = layer.weight.shape[1]
        rows = as_rows(layer).to(hessian.value)
        # all channels at the first place of the kernel, then all at the next: a pattern lies along the channels
        order = torch.arange(rows.shape[-1], device=rows.device).view(channels, -1).T.flatten()
        damped = hessian.damped(self.config.damping)[:, order][:, :, order]
        factor = inverse_factor(damped, repr(hessian.name))
        weight = rows[..., order]
        swept = sweep(weight, factor, self._choice(weight, channels, zeros))
        return torch.empty_like(rows).index_copy_(2, order, swept)

    def _choice(self, weight: torch.Tensor, channels: int, zeros: int) -> Choice:
        if self.config.pattern is not None:
            return Pattern(*self.config.keep_of, channels, weight.shape[-1] // channels)
        return Share(weight, zeros, self.config.block)


def sweep(weight: torch.Tensor, factor: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Return `weight`, `(groups, rows, inputs)`, pruned by `choice` from the first input to the last.

    `factor` is the upper U with H^-1 = U^T U, `(groups, inputs, inputs)`. Removing the weight at input j costs
    w_j^2 / U_jj^2, twice L of Optimal Brain Surgeon with the inputs before j held, and changes the weights after it by
    -(w_j / U_jj) U_j (Frantar & Alistarh 2023, section 3.4). Blocks of inputs are brought up to date when their turn
    comes, so the work is in matrix products. Weights that are zero stay zero.
    """
    result, errors = weight.clone(), torch.zeros_like(weight)
    pivots = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    for start, end in pairwise(accumulate(choice.widths, initial=0)):
        block, upper = result[..., start:end], factor[:, start:end, start:end]
        block -= errors[..., :start] @ factor[:, :start, start:end]
        zero = weight[..., start:end] == 0
        scores = (block / pivots[..., start:end]).square().masked_fill(zero, -1)
        gone = ~choice.keep(scores, start) | zero
        for j in range(end - start):
            error = (block[..., j] / pivots[..., start + j]).masked_fill(~gone[..., j], 0)
            block[..., j:] -= error.unsqueeze(-1) * upper[:, j, None, j:]
            errors[..., start + j] = error
        block.masked_fill_(gone, 0)
    return result
