"""The pass over the inputs equals Optimal Brain Surgeon with the inputs behind it held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rarefy.hessian import inverse_factor
from rarefy_pruning.second_order.sparsegpt import Pattern, Share, sweep

Array = np.ndarray


class Given:
    """A mask that is known beforehand, in blocks of given widths."""

    def __init__(self, mask: torch.Tensor, widths: list[int]) -> None:
        self.mask, self.widths = mask, widths

    def keep(self, scores: torch.Tensor, start: int) -> torch.Tensor:
        return self.mask[..., start : start + scores.shape[-1]]


def problem(n: int = 7, rows: int = 4, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 50, n, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, n, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, n, generator=generator, dtype=torch.float64)
    mask = torch.rand(groups, rows, n, generator=generator) < 0.5
    return weight, 2 * x.mT @ x / 50 + 0.05 * torch.eye(n, dtype=torch.float64), mask


def surgeon(w: Array, h: Array, mask: Array) -> Array:
    """Remove each row's masked-out weights from first to last; only the inputs from there on may change (eq. 3)."""
    w = w.copy()
    for row in range(len(w)):
        for q in np.flatnonzero(~mask[row]):
            inverse = np.linalg.inv(h[q:, q:])
            w[row, q:] -= w[row, q] / inverse[0, 0] * inverse[:, 0]
            w[row, q] = 0
    return w


@pytest.mark.parametrize("widths", [[1] * 7, [3, 3, 1], [7], [2, 5]])
def test_a_given_mask_equals_the_surgeon_whatever_the_blocks(widths: list[int]) -> None:
    weight, h, mask = problem()
    swept = sweep(weight, inverse_factor(h), Given(mask, widths))
    np.testing.assert_allclose(
        swept[0].numpy(), surgeon(weight[0].numpy(), h[0].numpy(), mask[0].numpy()), rtol=1e-8, atol=1e-10
    )
    assert torch.equal(swept == 0, ~mask)


def test_groups_are_problems_of_their_own() -> None:
    weight, h, mask = problem(groups=3)
    together = sweep(weight, inverse_factor(h), Given(mask, [4, 3]))
    for g in range(3):
        alone = sweep(weight[g, None], inverse_factor(h[g, None]), Given(mask[g, None], [4, 3]))
        torch.testing.assert_close(together[g], alone[0], rtol=1e-10, atol=1e-12)


def test_the_scores_are_the_costs_with_what_lies_behind_held() -> None:
    weight, h, _ = problem()
    seen: list[torch.Tensor] = []

    class Watch(Given):
        def keep(self, scores: torch.Tensor, start: int) -> torch.Tensor:
            seen.append(scores)
            return torch.ones_like(scores, dtype=torch.bool)

    swept = sweep(weight, inverse_factor(h), Watch(weight != 0, [4, 3]))
    assert torch.equal(swept, weight)
    for q in range(7):
        expected = weight[0, :, q] ** 2 / torch.linalg.inv(h[0, q:, q:])[0, 0]
        torch.testing.assert_close(torch.cat(seen, 2)[0, :, q], expected)


def test_nothing_comes_after_the_last_input_so_it_only_goes() -> None:
    weight, h, _ = problem()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[..., -1] = False
    swept = sweep(weight, inverse_factor(h), Given(mask, [7]))
    assert torch.equal(swept[..., :-1], weight[..., :-1])
    assert not swept[..., -1].any()


class TestShare:
    @pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
    @pytest.mark.parametrize("zeros", [1, 9, 14, 27])
    def test_the_count_is_exact(self, zeros: int, block: int) -> None:
        weight, h, _ = problem()
        swept = sweep(weight, inverse_factor(h), Share(weight, zeros, block))
        assert int((swept == 0).sum()) == zeros

    def test_it_counts_and_keeps_the_zeros_there_are(self) -> None:
        weight, h, _ = problem()
        weight[..., 5:] = 0
        weight[0, 1, :4] = 0
        swept = sweep(weight, inverse_factor(h), Share(weight, 20, 3))
        assert int((swept == 0).sum()) == 20
        assert not swept[weight == 0].any()

    def test_each_block_gives_the_same_share(self) -> None:
        weight, h, _ = problem(12, 10)
        swept = sweep(weight, inverse_factor(h), Share(weight, 60, 4))
        assert [(swept[..., i : i + 4] == 0).sum() for i in (0, 4, 8)] == [20, 20, 20]


class TestPattern:
    def test_at_most_n_of_m_stay_and_more_would_not(self) -> None:
        weight, h, _ = problem(12, 10)
        swept = sweep(weight, inverse_factor(h), Pattern(2, 4, channels=12, places=1))
        assert (swept.view(10, 3, 4).count_nonzero(-1) == 2).all()

    def test_a_zero_is_never_filled(self) -> None:
        weight, h, _ = problem(8, 10)
        weight[..., :3] = 0
        swept = sweep(weight, inverse_factor(h), Pattern(2, 4, channels=8, places=1))
        assert not swept[..., :3].any()
        assert (swept[..., 4:].count_nonzero(-1) == 2).all()

    def test_a_block_ends_with_its_place_in_the_kernel(self) -> None:
        assert Pattern(2, 4, channels=6, places=2).widths == [4, 2, 4, 2]


def test_choosing_with_correction_beats_choosing_without() -> None:
    weight, h, _ = problem(40, 16)
    swept = sweep(weight, inverse_factor(h), Share(weight, 320, 8))
    threshold = weight.abs().flatten().kthvalue(320).values
    magnitude = torch.where(weight.abs() > threshold, weight, 0)

    def error(after: torch.Tensor) -> Any:
        return torch.einsum("gri,gij,grj->", after - weight, h, after - weight)

    assert error(swept) < 0.5 * error(magnitude)
