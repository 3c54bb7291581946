"""Masks of a pattern: exactly so many in each block, along the inputs."""

from __future__ import annotations

import pytest
import torch
from rarefy_pruning.weights.masks import pattern_mask


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 5), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_each_block_keeps_its_largest(keep: int, of: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 3 * of).to(dtype)
    mask = pattern_mask(scores, keep, of)
    blocks, kept = scores.view(6, 3, of), mask.view(6, 3, of)
    assert bool((kept.sum(-1) == keep).all())
    lowest_kept = blocks.masked_fill(~kept, torch.inf).amin(-1)
    highest_gone = blocks.masked_fill(kept, -torch.inf).amax(-1)
    assert bool((lowest_kept >= highest_gone).all())


def test_blocks_are_consecutive_input_channels_at_one_place_of_the_kernel() -> None:
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[0, :, 0, 1] = torch.tensor([1.0, 4.0, 2.0, 3.0])
    mask = pattern_mask(scores, 2, 4)
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, True, False, True]
    assert mask.shape == scores.shape
    assert mask.is_contiguous()


def test_a_shorter_last_block_keeps_as_many_as_a_whole_one() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0, 3.0, 2.0]])
    assert pattern_mask(scores, 2, 4).tolist() == [[False, False, True, True, False, True, True]]
    assert pattern_mask(scores[:, :5], 2, 4).tolist() == [[False, False, True, True, True]]


def test_equal_scores_keep_the_first_and_negative_infinity_goes_before_padding() -> None:
    assert pattern_mask(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]
    lowest = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    assert pattern_mask(lowest, 2, 4).tolist() == [[True, True, False]]
