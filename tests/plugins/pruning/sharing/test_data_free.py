"""Merging neurons: copies merge without any error, others in the order of their saliency."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.dependencies import cut
from rarefy.errors import StageError
from rarefy.pipeline import run
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy.technique import Analysis
from rarefy.testing import TechniqueConformance
from rarefy.zoo.resnet import resnet20
from rarefy_pruning.sharing.config import DataFreeConfig
from rarefy_pruning.sharing.data_free import DataFree
from torch import nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Inputs:
    """All that the technique wants of a task."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def example_inputs(self, batch_size: int = 1) -> tuple[torch.Tensor]:
        return (torch.randn(batch_size, *self.shape, generator=torch.Generator().manual_seed(0)),)


def analyzed(model: nn.Module, inputs: Any, **options: Any) -> tuple[DataFree, Analysis]:
    technique = DataFree(DataFreeConfig(**options))
    return technique, technique.analyze(model, inputs)


def merge(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    technique, analysis = analyzed(model, inputs, **options)
    return technique.transform(copy.deepcopy(model), analysis, inputs)


def double_(first: Any, reader: Any, places: int = 1, norm: Any = None) -> None:
    """Make the second half of the neurons of `first` copies of the first, with other outgoing weights.

    With a normalization between, the copies differ in themselves and agree only together with it.
    """
    half = len(first.weight) // 2
    assert reader.weight.shape[1] == 2 * half * places
    with torch.no_grad():
        first.weight[half:] = first.weight[:half]
        if first.bias is not None:
            first.bias[half:] = first.bias[:half]
        if norm is not None:
            for module in (first, norm):
                module.double()
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor[:half] += torch.rand(half)
                tensor[half:] = tensor[:half]
            first.weight[half:] *= 3
            norm.running_mean[half:] *= 3
            norm.running_var[half:] = 9 * (norm.running_var[:half] + norm.eps) - norm.eps


def perceptron() -> tuple[nn.Module, Inputs, int]:
    model = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5))
    double_(model[0], model[2])
    return model, Inputs(7), 6


def without_bias() -> tuple[nn.Module, Inputs, int]:
    model = nn.Sequential(nn.Linear(7, 12, bias=False), nn.Tanh(), nn.Linear(12, 5))
    double_(model[0], model[2])
    return model, Inputs(7), 6


def flattened() -> tuple[nn.Module, Inputs, int]:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5))
    double_(model[0], model[4], places=9)
    return model, Inputs(2, 8, 8), 4


def convolutions() -> tuple[nn.Module, Inputs, int]:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, (3, 2), stride=2, padding=1), nn.Flatten())
    double_(model[0], model[2])
    return model, Inputs(2, 8, 8), 4


def normalized() -> tuple[nn.Module, Inputs, int]:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))
    double_(model[0], model[3], norm=model[1])
    return model, Inputs(2, 8, 8), 4


class Branches(nn.Module):
    """Neurons that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(7, 12), nn.Linear(12, 4), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x).relu()
        return self.left(x), self.right(torch.cat((x, x.square()), -1))


def branches() -> tuple[nn.Module, Inputs, int]:
    model = Branches()
    double_(model.first, model.left)
    return model, Inputs(7), 6


MADE = [perceptron, without_bias, flattened, convolutions, normalized, branches]


class TestAmount(TechniqueConformance):
    config = DataFreeConfig(amount=0.5)


class TestCutoff(TechniqueConformance):
    config = DataFreeConfig(cutoff=0.2, per_layer={"hidden": 0.3}, finetune={"epochs": 1})


class TestCopies:
    @pytest.mark.parametrize("make", MADE, ids=[make.__name__ for make in MADE])
    def test_they_merge_without_error(self, make: Callable[[], tuple[nn.Module, Inputs, int]]) -> None:
        model, inputs, left = make()
        model = model.double().eval()
        x = inputs.example_inputs(16)[0].double()
        inputs.example_inputs = lambda batch_size=1: (x[:batch_size],)  # type: ignore[method-assign]
        technique, analysis = analyzed(model, inputs, amount=0.5)
        # exactly 0 but for the rounding of the normalization that is folded in
        assert analysis.layers[0].scores["largest_saliency"] <= (1e-24 if make is normalized else 0)
        compact = technique.transform(copy.deepcopy(model), analysis, inputs)
        assert len(next(compact.parameters())) == left
        for before, after in zip(_tensors(model(x)), _tensors(compact(x)), strict=True):
            assert torch.allclose(before, after, atol=1e-12)
        unmerged = cut(model, analysis.plan.dependencies, {m.group: m.removed for m in analysis.plan.mergings})
        assert not torch.allclose(_tensors(model(x))[0], _tensors(unmerged(x))[0], atol=1e-2)

    def test_one_more_has_an_error(self) -> None:
        model, inputs, _ = perceptron()
        x = torch.randn(16, 7)
        assert torch.allclose(merge(model, inputs, amount=6 / 12)(x), model(x), atol=1e-6)
        assert not torch.allclose(merge(model, inputs, amount=7 / 12)(x), model(x), atol=1e-3)

    def test_the_bias_is_a_coordinate_like_any_other(self) -> None:
        model, inputs, _ = perceptron()
        with torch.no_grad():
            model[0].bias[7:] += 0.5
            model[2].weight.fill_(2.0)
        _, analysis = analyzed(model, inputs, amount=2 / 12)
        first, second = analysis.plan.mergings[0].merges
        assert {first.kept, first.removed} == {0, 6}
        assert first.saliency == 0
        # <a^2> (||W_i - W_j||^2 + (b_i - b_j)^2) = 4 (0 + 1/4), not once per coordinate of W
        assert second.saliency == pytest.approx(1.0)

    def test_the_default_takes_copies_and_stops(self) -> None:
        model, inputs, left = perceptron()
        # each of the 12 has one copy: 12 of 132 pairs, 9 %
        assert merge(model, inputs, cutoff=0.09)[0].out_features == left
        assert merge(model, inputs, cutoff=0.05)[0].out_features == left


class TestChains:
    def test_later_layers_see_what_earlier_merges_left(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            model[0].weight[3:], model[0].bias[3:] = model[0].weight[:3], model[0].bias[:3]
            # these two differ now, and are one function as soon as the copies before them are merged
            model[2].weight[1, :3], model[2].weight[1, 3:] = model[2].weight[0, 3:], model[2].weight[0, :3]
            model[2].bias[1] = model[2].bias[0]
        technique, analysis = analyzed(model, Inputs(4), per_layer={"0": 0.5, "2": 0.25})
        compact = technique.transform(copy.deepcopy(model), analysis, Inputs(4))
        x = torch.randn(9, 4)
        assert [compact[0].out_features, compact[2].in_features, compact[2].out_features] == [3, 3, 3]
        assert torch.allclose(compact(x), model(x), atol=1e-6)

    def test_the_original_is_left_alone_and_the_counts_are_told(self) -> None:
        model = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 4))
        before = copy.deepcopy(model.state_dict())
        technique, analysis = analyzed(model, Inputs(64), amount=0.3)
        compact = technique.transform(copy.deepcopy(model), analysis, Inputs(64))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert [compact[0].out_features, compact[2].out_features] == [21, 7]
        assert [layer.scores["neurons_after"] for layer in analysis.layers] == [21, 7]
        assert [layer.action.split(",")[0] for layer in analysis.layers] == ["21 of 30 neurons", "7 of 10 neurons"]

    def test_one_neuron_always_stays(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        assert merge(model, Inputs(4), amount=0.99)[0].out_features == 1

    def test_in_a_residual_network_the_free_channels_merge_and_the_others_are_told(self) -> None:
        model = resnet20(num_classes=4).eval()
        inputs = Inputs(3, 16, 16)
        technique, analysis = analyzed(model, inputs, amount=0.25)
        assert [layer.name.rpartition(".")[2] for layer in analysis.layers] == ["conv1"] * 9
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert all(reasons[f"stage{s}.{b}.conv2"].startswith("they are added to") for s in (1, 2, 3) for b in (0, 1, 2))
        compact = technique.transform(copy.deepcopy(model), analysis, inputs)
        assert compact(*inputs.example_inputs(2)).shape == (2, 4)
        assert compact.get_submodule("stage1.0.conv1").out_channels == 12


def test_merging_loses_less_than_cutting(trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    technique, analysis = analyzed(trained_digits, digits_task, amount=0.5)
    merged = technique.transform(copy.deepcopy(trained_digits), analysis, digits_task)
    removal = {merging.group: merging.removed for merging in analysis.plan.mergings}
    unmerged = cut(trained_digits, analysis.plan.dependencies, removal)
    before = digits_task.score(trained_digits, "validation")
    assert digits_task.score(merged, "validation") > before - 0.08
    assert digits_task.score(merged, "validation") > digits_task.score(unmerged, "validation")


def test_the_default_loses_next_to_nothing(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    recipe = load_recipe({"steps": [{"technique": "pruning/data-free"}], "evaluate": {"batch_sizes": []}})
    report = run(recipe, tmp_path, model=trained_digits, task=digits_task).report
    assert report.steps[0].value("parameters") < 0.8 * report.baseline.value("parameters")
    assert report.test[1].value > report.test[0].value - 0.02


class TestBadInput:
    @pytest.mark.parametrize("amount", [0, 1, -0.5, 2, float("nan")])
    def test_amounts_that_leave_none_or_all_are_refused(self, amount: float) -> None:
        for options in ({"amount": amount}, {"per_layer": {"0": amount}}, {"cutoff": amount}):
            with pytest.raises(ValidationError, match=next(iter(options))):
                DataFreeConfig(**options)

    def test_two_measures_are_one_too_many(self) -> None:
        with pytest.raises(ValidationError, match="leave one out"):
            DataFreeConfig(amount=0.5, cutoff=0.1)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("tensor", ["0.weight", "0.bias", "1.running_mean", "3.weight"])
    def test_weights_that_are_not_finite_are_refused(self, tensor: str, value: float) -> None:
        model, inputs, _ = normalized()
        model.float()[0].bias = nn.Parameter(torch.zeros(8))
        model.state_dict()[tensor].flatten()[0] = value
        with pytest.raises(StageError, match="NaN or infinite"):
            analyzed(model, inputs, amount=0.5)

    def test_targets_and_patterns_that_match_nothing_are_refused(self) -> None:
        model, inputs, _ = perceptron()
        with pytest.raises(StageError, match="no layer matches"):
            analyzed(model, inputs, amount=0.5, targets={"include": ["none"]})
        with pytest.raises(StageError, match=r"'conv\*'.*target layers are 0, 2"):
            analyzed(model, inputs, per_layer={"conv*": 0.5})

    def test_too_few_neurons_are_told(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        for options, told in (({"amount": 0.1}, "10.0% of its 3 neurons"), ({}, "10.0% of the pairs of its 3 neurons")):
            _, analysis = analyzed(model, Inputs(4), **options)
            assert told in {layer.name: layer.reason for layer in analysis.skipped}["0"]
            assert not analysis.layers

    def test_a_layer_that_does_not_run_is_told(self) -> None:
        model, inputs, _ = perceptron()
        model.spare = nn.Linear(3, 3)  # type: ignore[assignment]
        model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
        _, analysis = analyzed(model, inputs, amount=0.5)
        assert "do not reach it" in {layer.name: layer.reason for layer in analysis.skipped}["spare"]


def _tensors(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
