"""Equalization: ranges by hand, the function kept, chains with depthwise layers, and what is left alone and why."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from rarefy import zoo
from rarefy.errors import StageError
from rarefy.folding import outputs_of
from rarefy.nouns import implement
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.rounding.config import EqualizeConfig
from torch import nn


class Example:
    """A task of which nothing but example inputs is used."""

    def __init__(self, *shape: int) -> None:
        self.inputs = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)),)

    def example_inputs(self, batch_size: int = 1) -> Any:
        return self.inputs


def equalized(model: nn.Module, task: Any, **options: Any) -> tuple[nn.Module, Any]:
    technique = implement(EqualizeConfig(**options))
    analysis = technique.analyze(model, task)
    return technique.transform(copy.deepcopy(model), analysis, task), analysis


def per_tensor(model: nn.Module, bits: int) -> nn.Module:
    technique = implement(UniformConfig(bits=bits, granularity="tensor"))
    return technique.transform(copy.deepcopy(model), technique.analyze(model, None), None)


def unbalanced(model: nn.Module, task: Any) -> nn.Module:
    """Multiply what each linear or convolution layer but the last gives by 10^-1.5 to 10^1.5, channel by channel."""
    torch.manual_seed(0)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for before, after in pairwise(layers):
            factor = 10 ** (3 * torch.rand(before.weight.shape[0]) - 1.5)
            before.weight *= factor.view(-1, *[1] * (before.weight.dim() - 1))
            before.bias *= factor
            if isinstance(after, nn.Linear):
                after.weight /= factor.repeat_interleave(after.weight.shape[1] // len(factor))
            else:
                after.weight /= factor.view(-1, 1, 1, 1) if after.groups > 1 else factor.view(1, -1, 1, 1)
    return model.eval()


def rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().abs().flatten(1).amax(1)


def columns(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().abs().transpose(0, 1).flatten(1).amax(1)


class TestPairs:
    def test_two_layers_by_hand(self) -> None:
        model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[8.0], [0.5]]))
            model[0].bias.copy_(torch.tensor([4.0, 1.0]))
            model[2].weight.copy_(torch.tensor([[0.5, 2.0]]))
        changed, _ = equalized(model, Example(3, 1))
        # s = sqrt(8 / 0.5) = 4 and sqrt(0.5 / 2) = 1/2
        torch.testing.assert_close(changed[0].weight, torch.tensor([[2.0], [1.0]]))
        torch.testing.assert_close(changed[0].bias, torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(changed[2].weight, torch.tensor([[2.0, 1.0]]))
        assert torch.equal(changed[2].bias, model[2].bias)

    def test_ranges_are_equal_channel_by_channel_and_the_function_stays(self) -> None:
        task = Example(2, 1, 8, 8)
        torch.manual_seed(0)
        model = unbalanced(zoo.digits_cnn(), task)
        changed, analysis = equalized(model, task)
        wanted = outputs_of(model, task.inputs)
        torch.testing.assert_close(outputs_of(changed, task.inputs), wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))
        torch.testing.assert_close(rows(changed.conv1.weight), columns(changed.conv2.weight), rtol=2e-2, atol=0)
        # a channel of a convolution is read by 16 inputs of the linear layer
        read = columns(changed.fc1.weight).view(32, 16).amax(1)
        torch.testing.assert_close(rows(changed.conv2.weight), read, rtol=2e-2, atol=0)
        torch.testing.assert_close(rows(changed.fc1.weight), columns(changed.fc2.weight), rtol=2e-2, atol=0)
        scores = {layer.name: layer.scores for layer in analysis.layers}
        assert all(scores[name]["precision"] > 2 * scores[name]["precision_before"] for name in ("conv1", "conv2"))

    def test_chains_of_three_with_a_depthwise_layer_in_the_middle(self) -> None:
        torch.manual_seed(0)
        task = Example(2, 3, 6, 6)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.LeakyReLU(), nn.Conv2d(8, 5, 1)
        )
        model = unbalanced(model, task)
        changed, _ = equalized(model, task, rounds=200)
        first, second, third = (changed[i].weight for i in (0, 2, 4))
        torch.testing.assert_close(rows(first), rows(second), rtol=5e-3, atol=0)
        torch.testing.assert_close(rows(second), columns(third), rtol=5e-3, atol=0)
        product = rows(model[0].weight) * rows(model[2].weight) * columns(model[4].weight)
        torch.testing.assert_close(rows(first), product ** (1 / 3), rtol=1e-2, atol=0)
        torch.testing.assert_close(outputs_of(changed, task.inputs), outputs_of(model, task.inputs))

    def test_a_residual_stream_is_scaled_in_all_its_layers(self) -> None:
        torch.manual_seed(0)
        task, model = Example(2, 3, 16, 16), zoo.resnet20(in_channels=3)
        for _ in range(2):
            model(torch.randn(8, 3, 16, 16) + 0.5)
        changed, analysis = equalized(model.eval(), task)
        assert not analysis.skipped
        assert all("takes in" in layer.action for layer in analysis.layers if layer.name != "fc")
        wanted = outputs_of(model, task.inputs)
        torch.testing.assert_close(outputs_of(changed, task.inputs), wanted, rtol=1e-3, atol=1e-4)
        assert not torch.equal(changed.fc.weight, model.fc.weight)

    def test_it_saves_a_badly_scaled_network_from_one_step_size_per_layer(
        self, digits_task: Any, trained_digits: nn.Module
    ) -> None:
        model = unbalanced(trained_digits, digits_task)
        full = digits_task.score(model, "validation")
        assert digits_task.score(per_tensor(model, 8), "validation") < full - 0.2
        changed, _ = equalized(model, digits_task)
        assert digits_task.score(per_tensor(changed, 8), "validation") > full - 0.02


class TestWhatStays:
    @pytest.mark.parametrize("activation", [nn.ReLU6(), nn.GELU(), nn.Sigmoid(), nn.Hardswish()])
    def test_activations_that_clip_or_bend(self, activation: nn.Module) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        changed, analysis = equalized(model, Example(8, 4))
        assert [layer.name for layer in analysis.layers] == ["2", "4"]
        assert "an activation that clips or bends" in analysis.skipped[0].reason
        assert torch.equal(changed[0].weight, model[0].weight)

    def test_norms_in_the_midst_and_blocks_of_grouped_convolutions(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)).eval()
        model.append(nn.Conv2d(8, 8, 1)).append(nn.GroupNorm(2, 8)).append(nn.Conv2d(8, 2, 1))
        with pytest.raises(StageError, match="no layer matches"):
            equalized(model, Example(2, 4, 3, 3), targets={"include": ("nowhere",)})
        _, analysis = equalized(model, Example(2, 4, 3, 3), fold=False)
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert "in blocks" in reasons["0"]
        assert "in blocks" in reasons["4"]
        assert "part of the model's output" in reasons["6"]

    def test_without_folding_a_norm_stands_between(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        model(torch.randn(8, 4, 3, 3) + 0.5)
        model.eval()
        analysis = implement(EqualizeConfig(fold=False)).analyze(model, Example(2, 4, 3, 3))
        assert "'1', a BatchNorm2d, stands between" in analysis.skipped[0].reason
        changed, analysis = equalized(model, Example(2, 4, 3, 3))
        assert [layer.name for layer in analysis.layers] == ["0", "3"]
        assert isinstance(changed[1], nn.Identity)

    def test_layers_that_are_no_targets_and_channels_of_zeros(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        with torch.no_grad():
            model[0].weight[1], model[2].weight[:, 2] = 0, 0
        changed, analysis = equalized(model, Example(8, 4), targets={"exclude": ("4",)})
        assert [layer.name for layer in analysis.layers] == ["0", "2"]
        assert torch.equal(changed[4].weight, model[4].weight)
        assert torch.equal(changed[0].weight[2], model[0].weight[2])
        assert torch.equal(changed[0].weight == 0, model[0].weight == 0)

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        model[0].weight.data[0, 0] = torch.nan
        with pytest.raises(StageError, match="NaN"):
            equalized(model, Example(8, 4))
