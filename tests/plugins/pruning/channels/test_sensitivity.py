"""Shares by sensitivity: curves, hulls, and the cheapest way to a budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from rarefy.measure import parameters
from rarefy.tasks import ClassificationTask
from rarefy_pruning.channels.allocation import lowest, pools
from rarefy_pruning.channels.sensitivity import Sensitivity, hull
from torch import nn


@pytest.mark.parametrize(
    ("points", "units", "expected"),
    [
        ({2: 2.0, 4: 6.0, 6: 12.0}, 8, [1, 1, 2, 2, 3, 3, 3, 3]),
        # a bump and a dip vanish in the hull
        ({2: 6.0, 4: 4.0, 6: 12.0}, 8, [1, 1, 1, 1, 4, 4, 4, 4]),
        ({2: -1.0, 4: 0.0, 6: 3.0}, 8, [0, 0, 0, 0, 1.5, 1.5, 1.5, 1.5]),
        ({0: 0.0, 1: 2.0, 2: 2.0}, 2, [1, 1]),
    ],
)
def test_hulls_by_hand(points: dict[int, float], units: int, expected: list[float]) -> None:
    assert hull(points, units).tolist() == expected


def given(increases: dict[str, dict[int, float]], units: int) -> Sensitivity:
    """Return a sensitivity with these curves; units go from the last to the first."""
    made = Sensitivity.__new__(Sensitivity)
    made.increases = increases
    made.orders = {name: torch.arange(units).flip(0) for name in increases}
    return made


def test_the_greedy_choice_is_the_best_one() -> None:
    curves = {"a": {2: 1.0, 4: 3.0, 6: 9.0}, "b": {2: 0.5, 4: 4.0, 6: 8.0}, "c": {2: 2.0, 4: 4.5, 6: 7.0}}
    sensitivity = given(curves, 8)
    costs = sensitivity.costs(None)
    (pool,) = pools(costs, dict.fromkeys(curves, 0), sensitivity.orders)
    slopes = {name: hull(points, 8).cumsum(0).tolist() for name, points in curves.items()}
    total = {name: [0.0, *sums] for name, sums in slopes.items()}
    for count in range(1, 14):
        gone = lowest(pool, count / 24, 0, 1)
        ways = [c for c in itertools.product(range(8), repeat=3) if sum(c) == count]
        best = min(sum(total[name][k] for name, k in zip(curves, way, strict=True)) for way in ways)
        assert sum(len(units) for units in gone.values()) == count
        assert sum(total[name][len(units)] for name, units in gone.items()) == pytest.approx(best)
        assert all(units.tolist() == list(range(8 - len(units), 8)) for units in gone.values())


def test_what_saves_twice_as_much_may_cost_twice_as_much() -> None:
    curves = {"a": {2: 2.0, 4: 4.0, 6: 6.0}, "b": {2: 2.0, 4: 4.0, 6: 6.0}}
    costs = given(curves, 8).costs(lambda removal: 0.5 if "a" in removal else 0.75)
    assert costs["a"].tolist() == pytest.approx([8.0] * 8)
    assert costs["b"].tolist() == pytest.approx([16.0] * 8)


def network() -> nn.Sequential:
    """Return a network whose second hidden layer does nothing for the outputs, but for one unit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        model[4].weight[:, :12] = 0
        model[4].weight *= 20
        model[2].weight[:12] *= 0.1
    return model


@pytest.mark.parametrize("labels", [True, False], ids=["loss", "outputs"])
def test_units_that_do_not_matter_go_first(prune: Any, make_task: Any, labels: bool) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    task = make_task(x, network()(x).argmax(1))
    if not labels:
        task = ClassificationTask.from_arrays(x, None, validation=(x, None), test=(x, None), batch_size=16)
    model = network()
    compact, analysis, _ = prune(model, task, amount=0.36, scope="sensitivity", least=0)
    assert compact[2].out_features <= 5
    assert compact[0].out_features >= 15
    figures = {layer.name: layer.scores for layer in analysis.layers}
    assert [figures["2"][f"increase_at_{units}_units"] for units in (4, 8, 12)] == pytest.approx([0, 0, 0], abs=1e-6)
    torch.testing.assert_close(compact(x).argmax(1).float().mean(), model(x).argmax(1).float().mean(), atol=0.1, rtol=0)


def test_a_budget_is_reached_with_less_loss_than_by_equal_shares(
    prune: Any, digits_task: ClassificationTask, trained_digits: nn.Module
) -> None:
    from rarefy.sensitivity import Increase

    increase = Increase(trained_digits, digits_task)
    target = {"measure": "parameters", "share": 0.5}
    results = []
    for scope in ("sensitivity", "layer"):
        compact, _, _ = prune(trained_digits, digits_task, target=target, scope=scope)
        assert parameters(compact) <= 0.5 * parameters(trained_digits)
        results.append(increase(compact))
    assert results[0] < results[1]
