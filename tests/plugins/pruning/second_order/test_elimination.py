"""Removing weights one by one equals the constrained least-squares problems it solves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from rarefy_pruning.second_order.elimination import eliminate
from rarefy_pruning.second_order.obs import cheapest, remove

Array = np.ndarray


def problem(n: int = 8, rows: int = 3, seed: int = 0) -> tuple[Array, Array]:
    """Return weights and an ill-balanced Hessian with strong correlations."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, n)) @ rng.normal(size=(n, n)) * rng.uniform(0.2, 3, n)
    return rng.normal(size=(rows, n)), 2 * x.T @ x / len(x) + 0.01 * np.eye(n)


def constrained(w: Array, h: Array, gone: list[int]) -> tuple[Array, float]:
    """Minimize 1/2 (v - w) H (v - w)^T with v zero at `gone`, by the equations of its Lagrangian."""
    n, k = len(w), len(gone)
    pick = np.eye(n)[gone]
    system = np.block([[h, pick.T], [pick, np.zeros((k, k))]])
    d = np.linalg.solve(system, np.concatenate([np.zeros(n), -w[gone]]))[:n]
    return w + d, 0.5 * d @ h @ d


def run(w: Array, h: Array, steps: int, fixed: list[int] | None = None) -> tuple[Array, Array, Array]:
    inverse = torch.from_numpy(np.stack([np.linalg.inv(h)] * len(w)))
    mask = None if fixed is None else torch.tensor([i in fixed for i in range(len(h))])
    done = eliminate(torch.from_numpy(w), inverse, steps, mask)
    return done.weight.numpy(), done.order.numpy(), done.losses.numpy()


@pytest.mark.parametrize("steps", range(1, 8))
def test_after_any_number_of_removals_the_rest_is_the_constrained_optimum(steps: int) -> None:
    w, h = problem()
    after, order, losses = run(w, h, steps)
    for row in range(len(w)):
        expected, error = constrained(w[row], h, list(order[row]))
        np.testing.assert_allclose(after[row], expected, rtol=1e-7, atol=1e-10)
        assert losses[row].sum() == pytest.approx(error, rel=1e-8)


def test_removed_weights_are_exact_zeros_and_different_ones() -> None:
    w, h = problem()
    after, order, _ = run(w, h, 6)
    for row in range(len(w)):
        assert len(set(order[row])) == 6
        assert sorted(np.flatnonzero(after[row] == 0)) == sorted(order[row])


def test_each_removal_is_the_one_that_costs_least_at_that_moment() -> None:
    w, h = problem(6, rows=1, seed=3)
    _, order, losses = run(w, h, 5)
    gone: list[int] = []
    for q, loss in zip(order[0], losses[0], strict=True):
        before = constrained(w[0], h, gone)[1] if gone else 0.0
        costs = {c: constrained(w[0], h, [*gone, c])[1] - before for c in set(range(6)) - set(gone)}
        assert min(costs, key=lambda c: costs[c]) == q
        assert loss == pytest.approx(costs[q], rel=1e-7)
        gone.append(int(q))


def test_the_saliency_is_hassibis() -> None:
    w, h = problem(5, rows=1)
    _, order, losses = run(w, h, 1)
    saliency = w[0] ** 2 / (2 * np.diag(np.linalg.inv(h)))
    assert order[0, 0] == saliency.argmin()
    assert losses[0, 0] == pytest.approx(saliency.min())


def test_with_uncorrelated_inputs_it_is_magnitude_and_moves_nothing() -> None:
    w = np.array([[3.0, -0.5, 2.0, 1.0]])
    after, order, losses = run(w, 2 * np.eye(4), 2)
    assert order.tolist() == [[1, 3]]
    assert losses.tolist() == [[0.25, 1.0]]
    assert after.tolist() == [[3.0, 0.0, 2.0, 0.0]]


def test_a_duplicate_input_takes_over_at_no_cost() -> None:
    x = np.random.default_rng(0).normal(size=(50, 2))
    x = np.column_stack([x, x[:, 0]])
    h = 2 * x.T @ x / 50 + 1e-9 * np.eye(3)
    after, order, losses = run(np.array([[1.0, 2.0, 1.5]]), h, 1)
    kept = 2 - order[0, 0]
    assert {order[0, 0], kept} == {0, 2}
    assert after[0, kept] == pytest.approx(2.5, rel=1e-6)
    assert losses[0, 0] == pytest.approx(0, abs=1e-8)


def test_what_is_zero_goes_first_for_nothing() -> None:
    w, h = problem()
    w[:, [2, 5]] = 0
    after, order, losses = run(w, h, 2)
    assert np.array_equal(np.sort(order, 1), [[2, 5]] * 3)
    assert not losses.any()
    np.testing.assert_array_equal(after, w)


def test_fixed_weights_are_corrected_and_never_removed() -> None:
    w, h = problem()
    after, order, _ = run(w, h, 5, fixed=[0, 4])
    assert not np.isin(order, [0, 4]).any()
    for row in range(len(w)):
        np.testing.assert_allclose(after[row], constrained(w[row], h, list(order[row]))[0], rtol=1e-7, atol=1e-10)


def test_no_steps_change_nothing() -> None:
    w, h = problem()
    after, order, losses = run(w, h, 0)
    assert np.array_equal(after, w)
    assert order.shape == losses.shape == (3, 0)


def test_removing_several_at_once_is_removing_them_one_by_one() -> None:
    w, h = problem()
    after, order, _ = run(w, h, 5)
    inverse = torch.from_numpy(np.linalg.inv(h))
    for row in range(len(w)):
        at_once = remove(torch.from_numpy(w[row]), inverse, torch.from_numpy(order[row]))
        np.testing.assert_allclose(at_once.numpy(), after[row], rtol=1e-7, atol=1e-10)
    assert torch.equal(remove(torch.from_numpy(w[0]), inverse, torch.tensor([], dtype=torch.long)).double(),
                       torch.from_numpy(w[0]))  # fmt: skip


class TestCheapest:
    def test_it_takes_the_next_cheapest_row_by_row(self) -> None:
        losses = np.random.default_rng(0).exponential(size=(4, 6))
        for count in range(25):
            taken = [0] * 4
            for _ in range(count):
                following = {r: losses[r, taken[r]] for r in range(4) if taken[r] < 6}
                taken[min(following, key=lambda r: following[r])] += 1
            assert cheapest(torch.from_numpy(losses), count).tolist() == taken

    def test_it_is_the_best_choice_where_costs_rise(self) -> None:
        losses = np.sort(np.random.default_rng(1).exponential(size=(3, 4)), 1)
        for count in range(1, 12):
            taken = cheapest(torch.from_numpy(losses), count).tolist()
            every = itertools.product(range(5), repeat=3)
            best = min(sum(losses[r, :c].sum() for r, c in enumerate(cs)) for cs in every if sum(cs) == count)
            assert sum(losses[r, :c].sum() for r, c in enumerate(taken)) == pytest.approx(best)
