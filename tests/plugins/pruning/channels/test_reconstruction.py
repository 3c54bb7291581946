"""Layers that lose inputs are fitted to the outputs that they had."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from rarefy import compress
from rarefy.dependencies import cut, find_dependencies
from rarefy.tasks import ClassificationTask
from rarefy_pruning.channels.config import ChannelL1Config, ChannelPruning, ChannelTaylorConfig
from rarefy_pruning.channels.reconstruction import _RIDGE, reconstruct_
from torch import nn


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ridge_regression(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and biases by least squares on the data, below it rows that pull towards `weight`."""
    centered = x - x.mean(0) if bias else x
    pull = np.sqrt(_RIDGE * (centered**2).mean(0).mean() * len(x)) * np.eye(x.shape[1])
    given = np.concatenate([centered, pull])
    wanted = np.concatenate([y - y.mean(0) if bias else y, pull @ weight.T])
    rows = np.linalg.lstsq(given, wanted, rcond=None)[0].T
    return rows, y.mean(0) - rows @ x.mean(0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_gets_the_least_squares_solution(bias: bool, make_task: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias)).eval()
    inputs = normal(40, 5)
    found = find_dependencies(model, (inputs,))
    removal = {"0": torch.tensor([1, 4, 6])}
    compact = cut(model, found, removal)
    before = compact[2].weight.detach().double().numpy()
    losses = reconstruct_(compact, model, found, removal, make_task(inputs, batch_size=7), batches=100)
    with torch.no_grad():
        x, y = compact[:2](inputs).double().numpy(), model(inputs).double().numpy()
    rows, biases = ridge_regression(x, y, before, bias)
    np.testing.assert_allclose(compact[2].weight.detach(), rows, atol=1e-5)
    if bias:
        np.testing.assert_allclose(compact[2].bias.detach(), biases, atol=1e-5)
    left = y - x @ rows.T - (biases if bias else 0)
    whole = y - y.mean(0) if bias else y
    assert losses == {"2": pytest.approx((left**2).sum() / (whole**2).sum(), rel=1e-3)}


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": 2, "dilation": 2, "bias": False}])
def test_a_channel_that_another_one_repeats_is_made_up_for(options: dict[str, Any], make_task: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, **options)).eval()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[3] = tensor[1]
    inputs = normal(20, 2, 9, 9)
    found = find_dependencies(model, (inputs,))
    removal = {"0": torch.tensor([3])}
    compact = cut(model, found, removal)
    kept = model[3].weight.detach()[:, :3].clone()
    kept[:, 1] += model[3].weight.detach()[:, 3]
    losses = reconstruct_(compact, model, found, removal, make_task(inputs), batches=2)
    torch.testing.assert_close(compact[3].weight.detach(), kept, rtol=0, atol=0.02)
    assert losses["3"] < 1e-3


class Shared(nn.Module):
    """A layer that is called twice, one that shares its weight, one that the data does not reach, a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.tied = nn.Linear(6, 3)
        self.tied.weight = self.out.weight
        self.unused = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.a(x).relu()).relu()).relu()
        return self.out(x) + self.tied(x)


def test_layers_called_twice_are_fitted_to_both_calls_and_shared_weights_are_left(make_task: Any) -> None:
    torch.manual_seed(0)
    model, inputs = Shared().eval(), normal(30, 4)
    found = find_dependencies(model, (inputs,))
    (group,) = found.groups
    removal = {group.name: torch.tensor([0, 2])}
    compact = cut(model, found, removal)
    plain = copy.deepcopy(compact)
    losses = reconstruct_(compact, model, found, removal, make_task(inputs), batches=2)
    assert list(losses) == ["twice"]
    assert torch.equal(compact.out.weight, plain.out.weight)
    assert (compact(inputs) - model(inputs)).square().sum() < (plain(inputs) - model(inputs)).square().sum()


def test_accuracy_comes_back_without_training(
    prune: Any, trained_digits: nn.Module, digits_task: ClassificationTask
) -> None:
    plain, _, _ = prune(trained_digits, digits_task, amount=0.7)
    fitted, _, technique = prune(trained_digits, digits_task, amount=0.7, reconstruct=True)
    scores = [digits_task.score(model, "test") for model in (trained_digits, plain, fitted)]
    assert scores[1] < scores[0] - 0.1
    assert scores[2] > scores[0] - 0.05
    assert "layers reconstructed; the largest loss is" in technique.notes[0]


def test_the_original_and_its_mode_stay(prune: Any, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    before = {name: tensor.clone() for name, tensor in trained_digits.state_dict().items()}
    prune(trained_digits.train(), digits_task, amount=0.5, reconstruct=True, reconstruct_batches=1)
    assert trained_digits.training
    assert all(torch.equal(before[name], tensor) for name, tensor in trained_digits.state_dict().items())


class Product(nn.Module):
    """A parameter outside any layer reads the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 6), nn.Parameter(normal(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).relu() @ self.w


def test_nothing_to_fit_is_said(prune: Any, make_task: Any) -> None:
    _, _, technique = prune(Product(), make_task(normal(8, 4)), amount=0.5, reconstruct=True)
    assert technique.notes[0].startswith("nothing was reconstructed")


@pytest.mark.parametrize(
    ("config", "need"),
    [
        (ChannelL1Config(amount=0.5), "none"),
        (ChannelL1Config(amount=0.5, reconstruct=True), "unlabelled"),
        (ChannelL1Config(amount=0.5, scope="sensitivity"), "unlabelled"),
        (ChannelTaylorConfig(amount=0.5, reconstruct=True), "labelled"),
    ],
)
def test_the_data_that_is_needed_follows_the_options(config: ChannelPruning, need: str) -> None:
    assert config.needed_data() == need


def test_it_runs_in_a_recipe_in_rounds(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Any
) -> None:
    step = {"technique": "pruning/channel-l1", "amount": 0.5, "reconstruct": True, "rounds": 2}
    recipe = {"steps": [{**step, "finetune": {"epochs": 1, "lr": 1e-3}}], "evaluate": {"batch_sizes": []}}
    result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
    assert [stage.notes[0].partition(" layers")[0].isdigit() for stage in result.report.steps] == [True, True]
