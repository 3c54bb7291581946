"""What each criterion computes, against forms worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rarefy.dependencies import find_dependencies
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy_pruning.channels.criterion import ChannelCriterion
from rarefy_pruning.channels.units import Units, units_of
from rarefy_pruning.channels.weights import L1
from torch import nn
from torch.nn import functional as F

NAMES = ("activation", "batch-norm", "fisher", "geometric-median", "l1", "l2", "random", "taylor")


class Residual(nn.Module):
    """Two layers that write to one stream, which a third reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        out: torch.Tensor = self.last(h + torch.tanh(self.second(h)))
        return out


def units_in(model: nn.Module, x: torch.Tensor, name: str) -> Units:
    """Return the group of that name."""
    return units_of(model, [find_dependencies(model, (x,))[name]])[0]


def scores(technique: Any, model: nn.Module, task: Any, name: str = "0") -> torch.Tensor:
    """Return what a criterion gives the units of a group."""
    units = units_in(model, task.example_inputs(1)[0], name)
    technique.measure(model, [units], task)
    found: torch.Tensor = technique.score(units)
    return found.detach()


class TestWeights:
    def filters(self) -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(2, 3, (1, 2), bias=False), nn.ReLU(), nn.Conv2d(3, 1, 1))
        with torch.no_grad():
            model[0].weight.copy_(
                torch.tensor(
                    [[[[1.0, -1.0]], [[2.0, 0.0]]], [[[0.5, 0.5]], [[0.5, -0.5]]], [[[3.0, 4.0]], [[0.0, 0.0]]]]
                )
            )
        return model

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("l1", [4 / 4, 2 / 4, 7 / 4]),
            ("l2", [(6 / 4) ** 0.5, (1 / 4) ** 0.5, (25 / 4) ** 0.5]),
        ],
    )
    def test_norms_of_hand_made_filters(self, make: Any, make_task: Any, name: str, expected: list[float]) -> None:
        task = make_task(torch.randn(4, 2, 2, 3))
        found = scores(make(name, amount=0.5), self.filters(), task)
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_the_filters_of_a_stream_are_those_of_all_layers_that_write_to_it(self, make: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        model = Residual()
        found = scores(make("l1", amount=0.5), model, make_task(torch.randn(4, 2)), "first")
        by_hand = torch.cat([model.first.weight, model.second.weight], 1).abs().mean(1)
        torch.testing.assert_close(found, by_hand.detach())

    def test_the_geometric_median_is_the_brute_force_sum_of_distances(
        self, make: Any, perceptron: nn.Sequential, blobs: ClassificationTask
    ) -> None:
        rows = perceptron[0].weight.detach()
        expected = [sum(float((one - other).square().sum() ** 0.5) for other in rows) for one in rows]
        torch.testing.assert_close(
            scores(make("geometric-median", amount=0.5), perceptron, blobs), torch.tensor(expected)
        )

    def test_batch_norm_scores_by_scale(self, make: Any, prune: Any, make_task: Any) -> None:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)
        ).eval()
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.1, 1.0]))
        task = make_task(torch.randn(6, 2, 2, 2))
        torch.testing.assert_close(
            scores(make("batch-norm", amount=0.5), model, task), torch.tensor([0.5, 2.0, 0.1, 1.0])
        )
        compact, analysis, _ = prune(model, task, "batch-norm", amount=0.5)
        assert compact[1].weight.tolist() == [-2.0, 1.0]
        reasons = {skipped.name: skipped.reason for skipped in analysis.skipped}
        assert "no batch normalization" in reasons["4"]

    def test_random_follows_the_seed(self, make: Any, perceptron: nn.Sequential, blobs: ClassificationTask) -> None:
        found = []
        for seed in (3, 3, 4):
            technique = make("random", amount=0.5)
            technique.seed = seed
            found.append(scores(technique, perceptron, blobs))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


class TestGates:
    def gated_loss(self, model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model[2](model[1](model[0](x)) * gates), y)

    def test_taylor_is_the_mean_size_of_the_finite_differences_of_single_samples(
        self, make: Any, perceptron: nn.Sequential, blobs: ClassificationTask
    ) -> None:
        found = scores(make("taylor", amount=0.5, samples=100), perceptron, blobs)
        model, step, sizes = perceptron.double(), 1e-5, []
        for x, y in blobs.loader("train", 1):
            moved = []
            for sign in (1, -1):
                gates = torch.ones(8, dtype=torch.float64) + sign * step * torch.eye(8, dtype=torch.float64)
                losses = [self.gated_loss(model, x.double(), y, row).detach() for row in gates]
                moved.append(torch.stack(losses))
            sizes.append((moved[0] - moved[1]).abs() / (2 * step))
        torch.testing.assert_close(found.double(), torch.stack(sizes).mean(0), rtol=1e-3, atol=1e-6)

    def test_taylor_sees_gradients_that_cancel_over_the_samples(self, make: Any) -> None:
        # of two units that the samples pull in opposite ways, and one that nothing pulls
        model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Identity(), nn.Linear(3, 2, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0], [2.0], [1.0]]))
            model[2].weight.copy_(torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]]))
        data = (torch.ones(20, 1), torch.arange(20) % 2)
        task = ClassificationTask.from_arrays(*data, validation=data, test=data)
        found = scores(make("taylor", amount=0.5), model, task)
        assert found[1] == pytest.approx(2 * float(found[0]))
        assert found[0] > 0.9
        assert found[2] == 0

    def test_fisher_is_half_the_mean_square_of_the_gradients_of_single_samples(
        self, make: Any, perceptron: nn.Sequential, blobs: ClassificationTask
    ) -> None:
        found = scores(make("fisher", amount=0.5, samples=100), perceptron, blobs)
        squares = []
        for x, y in blobs.loader("train", 1):
            gates = torch.ones(8, requires_grad=True)
            (gradient,) = torch.autograd.grad(self.gated_loss(perceptron, x, y, gates), gates)
            squares.append(gradient.square())
        torch.testing.assert_close(found, torch.stack(squares).mean(0) / 2)

    def test_frozen_weights_have_gates_too_and_stay_frozen(
        self, make: Any, perceptron: nn.Sequential, blobs: ClassificationTask
    ) -> None:
        expected = scores(make("taylor", amount=0.5), perceptron, blobs)
        perceptron.requires_grad_(False)
        assert torch.equal(scores(make("taylor", amount=0.5), perceptron, blobs), expected)
        assert not any(p.requires_grad for p in perceptron.parameters())


class TestActivations:
    @pytest.mark.parametrize("statistic", ["mean", "nonzero", "deviation"])
    def test_statistics_of_a_hidden_layer(
        self, make: Any, perceptron: nn.Sequential, blobs: ClassificationTask, statistic: str
    ) -> None:
        found = scores(make("activation", amount=0.5, statistic=statistic), perceptron, blobs)
        x = torch.cat([inputs[0] for inputs in blobs.calibration(batches=8)])
        h = perceptron[:2](x).detach()
        by_hand = {"mean": h.abs().mean(0), "nonzero": (h > 0).float().mean(0), "deviation": h.std(0, correction=0)}
        torch.testing.assert_close(found, by_hand[statistic], rtol=1e-4, atol=1e-6)

    def test_channels_are_averaged_over_positions_and_where_they_are_flattened(self, make: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)).eval()
        task = make_task(torch.randn(12, 1, 4, 4))
        found = scores(make("activation", amount=0.5), model, task)
        x = torch.cat([inputs[0] for inputs in task.calibration(batches=8)])
        torch.testing.assert_close(found, model[:2](x).detach().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_go_with_all_that_depends_on_them(name: str, prune: Any, make: Any, make_task: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)).eval()
    nn.init.uniform_(model[1].weight, 0.1, 2)
    task = make_task(torch.randn(12, 1, 4, 4))
    expected = scores(make(name, amount=0.5), model, task).sort()
    compact, _, _ = prune(model, task, name, amount=0.5)
    kept = expected.indices[3:].sort().values
    assert torch.equal(compact[0].weight, model[0].weight[kept])
    assert torch.equal(compact[1].running_var, model[1].running_var[kept])
    assert torch.equal(compact[4].weight.view(3, 3, 4), model[4].weight.view(3, 6, 4)[:, kept])


def test_another_criterion_is_a_few_lines(perceptron: nn.Sequential, blobs: ClassificationTask) -> None:
    class Largest(ChannelCriterion[Any]):
        """The contrary of L1."""

        def score(self, units: Units) -> torch.Tensor:
            return -units.filters().abs().mean(1)

    config = load_recipe({"steps": [{"technique": "pruning/channel-l1", "amount": 0.5}]}).steps[0]
    removals = [kind(config).analyze(perceptron, blobs).plan.removal["0"] for kind in (Largest, L1)]
    assert torch.equal(torch.cat(removals).sort().values, torch.arange(8))
