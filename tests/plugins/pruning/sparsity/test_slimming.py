"""Network slimming: the L1 on the scales, the global cut, and the constants that the shifts leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.rules import rules_for
from rarefy.tasks import ClassificationTask
from rarefy.testing import TechniqueConformance
from rarefy.training import fit
from rarefy.zoo.resnet import ResNet
from rarefy_pruning.sparsity.config import NetworkSlimmingConfig
from rarefy_pruning.sparsity.slimming import NetworkSlimming
from rarefy_schemas import Finetune
from torch import nn


def perceptron(width: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def convolutions(padding: int = 0) -> nn.Sequential:
    """Build a network whose batch norms have shifts that matter."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 10)),
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.2, 0.8)
    return model.eval()


def slim(technique: NetworkSlimming, model: nn.Module, task: ClassificationTask) -> nn.Module:
    """Cut by the scales there are."""
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    return technique.consolidate(changed)


def difference(one: nn.Module, other: nn.Module, task: ClassificationTask) -> float:
    inputs = task.example_inputs(50)
    with torch.no_grad():
        return float((one.eval()(*inputs) - other.eval()(*inputs)).abs().max())


class TestCut:
    def test_channels_with_scale_zero_go_without_a_trace(self, digits_task: ClassificationTask) -> None:
        model = convolutions()
        with torch.no_grad():
            model[1].weight[[0, 3]] = 0
            model[4].weight[[1, 2, 5]] = 0
        compact = slim(NetworkSlimming(NetworkSlimmingConfig(amount=5 / 14)), model, digits_task)
        assert (compact[0].out_channels, compact[3].out_channels, compact[8].in_features) == (4, 5, 5)
        assert difference(model, compact, digits_task) < 1e-5

    def test_the_smallest_scales_of_all_layers_go(self, digits_task: ClassificationTask) -> None:
        model = convolutions()
        scores = torch.cat([model[1].weight, model[4].weight]).detach().abs()
        threshold = scores.sort().values[7]
        compact = slim(NetworkSlimming(NetworkSlimmingConfig(amount=0.5)), model, digits_task)
        for norm, after in ((model[1], compact[1]), (model[4], compact[4])):
            assert torch.equal(after.weight, norm.weight[norm.weight >= threshold])

    def test_a_cut_channel_leaves_what_its_shift_makes(self, digits_task: ClassificationTask) -> None:
        model = convolutions()
        compact = slim(NetworkSlimming(NetworkSlimmingConfig(amount=0.3)), model, digits_task)
        silenced = copy.deepcopy(model)
        gone = torch.cat([model[1].weight, model[4].weight]).detach().sort().values[:4]
        with torch.no_grad():
            for norm in (silenced[1], silenced[4]):
                norm.weight[torch.isin(norm.weight, gone)] = 0
        assert difference(silenced, compact, digits_task) < 1e-5
        # and that matters: the shifts are no trifle
        with torch.no_grad():
            for norm in (silenced[1], silenced[4]):
                norm.bias[norm.weight == 0] = 0
        assert difference(silenced, compact, digits_task) > 0.01

    def test_beside_padding_by_zeros_the_cut_is_told_to_be_rough(self, digits_task: ClassificationTask) -> None:
        technique = NetworkSlimming(NetworkSlimmingConfig(amount=0.5))
        slim(technique, convolutions(padding=1), digits_task)
        assert any("pad with zeros" in note for note in technique.notes)
        smooth = NetworkSlimming(NetworkSlimmingConfig(amount=0.5))
        slim(smooth, convolutions(padding=0), digits_task)
        assert not any("pad with zeros" in note for note in smooth.notes)

    def test_a_depthwise_convolution_passes_a_constant_that_has_a_border(self, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6)),
            *(nn.ReLU(), nn.Conv2d(6, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
        )
        nn.init.uniform_(model[1].weight, 0.5, 1.5)
        nn.init.ones_(model[1].bias)
        technique = NetworkSlimming(NetworkSlimmingConfig(amount=0.5))
        compact = slim(technique, model, digits_task)
        assert (compact[3].groups, compact[5].in_channels) == (3, 3)
        # the border of the depthwise convolution is no constant
        assert any("pad with zeros" in note for note in technique.notes)

    def test_a_layer_whose_scales_are_all_small_keeps_its_strongest(self, digits_task: ClassificationTask) -> None:
        model = convolutions()
        with torch.no_grad():
            model[1].weight.mul_(1e-3)
        technique = NetworkSlimming(NetworkSlimmingConfig(amount=0.6))
        compact = slim(technique, model, digits_task)
        assert (compact[0].out_channels, compact[3].out_channels) == (1, 5)
        assert torch.equal(compact[1].weight, model[1].weight.max()[None])
        assert any("All scales of 0 are among the smallest" in note for note in technique.notes)

    def test_coupled_channels_go_by_the_largest_of_their_scales(self, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = ResNet(1, 10, 1, 4, "project").eval()
        stream = [model.stage3[0].norm2.weight, model.stage3[0].shortcut[1].weight]
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.fill_(2.0)
            stream[0][:10] = 0.0
            stream[1][4:] = 0.0
        compact = slim(NetworkSlimming(NetworkSlimmingConfig(amount=6 / 56)), model, digits_task)
        # units 4 to 9 are zero in both
        assert compact.fc.in_features == 16 - 6
        assert difference(model, compact, digits_task) < 1e-4


class TestTraining:
    @pytest.mark.parametrize("method", ["proximal", "penalty"])
    def test_scales_die_and_the_network_still_works(self, digits_task: ClassificationTask, method: str) -> None:
        model = perceptron()
        fit(model, model, digits_task, Finetune(epochs=3, lr=5e-3))
        config = NetworkSlimmingConfig(
            amount=0.5, strength=0.08, method=method, finetune={"epochs": 8, "lr": 0.1, "optimizer": "sgd"}
        )
        technique = NetworkSlimming(config)
        trained = technique.transform(copy.deepcopy(model), technique.analyze(model, digits_task), digits_task)
        fit(trained, model, digits_task, config.finetune, rules_for(technique, trained), seed=1)
        zeros = sum(int((trained[i].weight == 0).sum()) for i in (2, 5))
        small = sum(int((trained[i].weight.abs() < 0.02).sum()) for i in (2, 5))
        assert small > 48
        assert (zeros > 0) == (method == "proximal")
        before = copy.deepcopy(trained)
        compact = technique.consolidate(trained)
        assert compact[1].out_features + compact[4].out_features == 48
        assert difference(before, compact, digits_task) < (1e-4 if method == "proximal" else 0.1)
        assert digits_task.score(compact, "validation") > 0.9

    def test_the_penalty_is_the_l1_norm_of_the_scales(self, digits_task: ClassificationTask) -> None:
        model = convolutions()
        config = NetworkSlimmingConfig(amount=0.5, strength=0.01, method="penalty", finetune={"epochs": 1})
        technique = NetworkSlimming(config)
        changed = technique.transform(model, technique.analyze(model, digits_task), digits_task)
        penalty = technique.training_rule(changed).penalty(changed)
        expected = 0.01 * (model[1].weight.abs().sum() + model[4].weight.abs().sum())
        assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
        penalty.backward()
        # eq. 1 of the paper: the gradient is the sign
        assert torch.allclose(changed[1].weight.grad, 0.01 * changed[1].weight.sign(), atol=1e-6)


class TestSkipped:
    def test_channels_that_scales_cannot_silence_are_left(self, digits_task: ClassificationTask) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.body, self.norm = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
                self.head = nn.Linear(6, 10)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.stem(x)
                return self.head((y + self.norm(self.body(y))).mean((2, 3)))

        technique = NetworkSlimming(NetworkSlimmingConfig(amount=0.5))
        analysis = technique.analyze(Block(), digits_task)
        assert not analysis.layers
        assert "still reads its channels" in analysis.skipped[0].reason

    def test_a_coupled_norm_that_is_no_target_and_one_without_scales(self, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = ResNet(1, 10, 1, 4, "project")
        model.stage1[0].norm1 = nn.BatchNorm2d(4, affine=False)
        config = NetworkSlimmingConfig(amount=0.5, targets={"exclude": ["stage2.0.shortcut.1"]})
        analysis = NetworkSlimming(config).analyze(model, digits_task)
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert "'stage2.0.shortcut.1', which is no target" in reasons["stage2.0.norm2"]
        assert "no scales" in reasons["stage1.0.norm1"]
        assert {"norm", "stage3.0.norm1"} <= {layer.name for layer in analysis.layers}

    def test_less_than_one_channel_is_none_and_it_is_said(self, digits_task: ClassificationTask) -> None:
        technique, model = NetworkSlimming(NetworkSlimmingConfig(amount=0.01)), convolutions()
        assert difference(slim(technique, model, digits_task), model, digits_task) == 0
        assert any(note.startswith("No channel was cut") for note in technique.notes)


class TestBadInput:
    def test_a_model_without_batch_norm_is_refused(
        self, trained_digits: nn.Module, digits_task: ClassificationTask
    ) -> None:
        with pytest.raises(StageError, match=r"no layer matches .*BatchNorm2d.*layers of types Conv2d"):
            NetworkSlimming(NetworkSlimmingConfig(amount=0.5)).analyze(trained_digits, digits_task)

    def test_scales_that_are_not_finite_are_refused(self, digits_task: ClassificationTask) -> None:
        model = convolutions()
        with torch.no_grad():
            model[4].weight[0] = float("nan")
        with pytest.raises(StageError, match=r"'4'.*NaN"):
            NetworkSlimming(NetworkSlimmingConfig(amount=0.5)).analyze(model, digits_task)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"amount": 0}, "amount"),
            ({"amount": 1}, "amount"),
            ({"amount": 0.5, "strength": 0}, "strength"),
            ({"amount": 0.5, "strength": -1, "finetune": {}}, "strength"),
            ({"amount": 0.5, "strength": 0.1}, "belong together"),
            ({"amount": 0.5, "finetune": {}}, "belong together"),
            ({"amount": 0.5, "strength": 0.1, "finetune": {"keep": "best"}}, "keep: last"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            NetworkSlimmingConfig(**options)


class TestConformance(TechniqueConformance):
    config = NetworkSlimmingConfig(amount=0.4, strength=0.5, finetune=Finetune(lr=0.1, optimizer="sgd"))

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return ResNet(1, 4, 2, 4, "project").eval()


class TestConformanceWithoutTraining(TechniqueConformance):
    config = NetworkSlimmingConfig(amount=0.4)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return ResNet(1, 4, 2, 4, "project").eval()
