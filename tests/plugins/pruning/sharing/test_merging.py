"""Merging on plain tensors, against the definition worked out pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rarefy_pruning.sharing.merging import Merge, distances, merge_order, merge_outgoing_, ordinary


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def brute_force(w: np.ndarray, a: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """Work out all saliencies anew before each merge: s_ij = <a_j^2> ||W_i - W_j||^2, a_i <- a_i + a_j."""
    a, alive, found = a.copy(), set(range(len(w))), []
    for _ in range(count):
        best = min(
            (float(np.mean(a[:, j] ** 2) * sum((w[i, d] - w[j, d]) ** 2 for d in range(w.shape[1]))), j, i)
            for i in alive
            for j in alive
            if i != j
        )
        saliency, j, i = best
        a[:, i] += a[:, j]
        alive.remove(j)
        found.append((i, j, saliency))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_order_is_that_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, a = rng.normal(size=(12, 5)), rng.normal(size=(7, 12)) * rng.exponential(size=12)
    expected = brute_force(w, a, 11)
    merges = merge_order(distances(torch.tensor(w)), torch.tensor(a), 11)
    assert [(m.kept, m.removed) for m in merges] == [(i, j) for i, j, _ in expected]
    assert [m.saliency for m in merges] == pytest.approx([s for _, _, s in expected])


def test_the_saliency_is_not_symmetric() -> None:
    incoming, outgoing = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[2.0, 0.5, 9.0], [0.0, 0.5, 9.0]])
    # <a_0^2> = 2, <a_1^2> = 1/4, both times the squared distance 1: the second is merged into the first
    assert merge_order(distances(incoming), outgoing, 1) == [Merge(kept=0, removed=1, saliency=0.25)]


def test_outgoing_weights_add_up_before_the_next_saliency() -> None:
    incoming, outgoing = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[3.0, 4.0, 8.0]])
    first, second = merge_order(distances(incoming), outgoing, 2)
    assert (first.kept, first.removed, first.saliency) == (1, 0, 0.0)
    # now 3 + 4 = 7 would go at the price of 49, cheaper than 64, though 3 and 4 alone cost 9 and 16
    assert (second.kept, second.removed, second.saliency) == (2, 1, 49.0)


def test_equal_neurons_cost_exactly_nothing_whatever_their_size() -> None:
    torch.manual_seed(0)
    distinct = 1e6 * torch.randn(8, 300)
    merges = merge_order(distances(distinct.repeat(4, 1)), torch.randn(5, 32), 24)
    assert [merge.saliency for merge in merges] == [0.0] * 24
    assert {merge.removed % 8 for merge in merges} == set(range(8))
    assert all(merge.removed % 8 == merge.kept % 8 for merge in merges)


def test_distances_are_right_where_rows_nearly_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(5, 40, dtype=torch.float64).repeat(3, 1)
    points[5:] += 1e-6 * torch.randn(10, 40, dtype=torch.float64)
    points[10:] += torch.randn(5, 40, dtype=torch.float64)
    monkeypatch.setattr("rarefy_pruning.sharing.merging._CHUNK", 80)
    expected = (points.unsqueeze(0) - points.unsqueeze(1)).square().sum(2).fill_diagonal_(torch.inf)
    assert torch.allclose(distances(points), expected, rtol=1e-8, atol=0)


def test_a_neuron_that_nobody_reads_costs_nothing() -> None:
    incoming, outgoing = torch.randn(4, 3), torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    merges = merge_order(distances(incoming), outgoing, 3)
    assert [m.removed for m in merges[:2]] == [1, 3]
    assert [m.saliency for m in merges[:2]] == [0.0, 0.0]


def test_one_neuron_stays_and_nothing_goes_twice() -> None:
    merges = merge_order(distances(torch.randn(9, 2)), torch.randn(3, 9), 100)
    assert len({merge.removed for merge in merges}) == len(merges) == 8
    gone: set[int] = set()
    for merge in merges:
        assert merge.kept not in gone
        gone.add(merge.removed)


def test_the_arguments_are_left_as_they_are() -> None:
    distance, outgoing = distances(torch.randn(6, 3)), torch.randn(2, 6).double()
    before = distance.clone(), outgoing.clone()
    merge_order(distance, outgoing, 4)
    assert torch.equal(distance, before[0])
    assert torch.equal(outgoing, before[1])


def test_merges_stop_before_the_limit_is_passed() -> None:
    distance, outgoing = distances(torch.randn(20, 3)), torch.randn(4, 20)
    merges = merge_order(distance, outgoing, 19)
    limit = merges[10].saliency
    expected = next(n for n, merge in enumerate(merges) if merge.saliency > limit)
    assert merge_order(distance, outgoing, 19, limit) == merges[:expected]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.99])
def test_the_ordinary_saliency_is_that_of_pairs_in_order(share: float) -> None:
    rng = np.random.default_rng(0)
    w, a = rng.normal(size=(8, 3)), rng.normal(size=(5, 8))
    a[:, 2] = 0
    pairs = sorted(
        float(np.mean(a[:, j] ** 2) * np.sum((w[i] - w[j]) ** 2)) for i in range(8) for j in range(8) if i != j
    )
    found = ordinary(distances(torch.tensor(w)), torch.tensor(a), share)
    assert found == pytest.approx(pairs[int(share * 56) - 1])


def test_less_than_one_pair_is_below_every_saliency() -> None:
    assert ordinary(distances(torch.zeros(3, 2)), torch.zeros(1, 3), 0.1) < 0


def test_merged_outgoing_weights_are_sums_along_the_chain() -> None:
    outgoing = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    merge_outgoing_(outgoing, [Merge(1, 0, 0.0), Merge(2, 1, 0.0)])
    assert outgoing.tolist() == [[0.0, 0.0, 111.0], [0.0, 0.0, 222.0]]
