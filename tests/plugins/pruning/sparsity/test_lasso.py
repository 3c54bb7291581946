"""Group lasso: what dies on a real task, and that what is cut was nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.dependencies import find_dependencies
from rarefy.errors import StageError
from rarefy.measure import flops
from rarefy.pipeline import run
from rarefy.recipe import load_recipe
from rarefy.rules import rules_for
from rarefy.tasks import ClassificationTask
from rarefy.testing import TechniqueConformance
from rarefy.testing.subjects import small_model, small_task
from rarefy.training import fit
from rarefy.zoo.resnet import ResNet
from rarefy_pruning.sparsity.config import GroupLassoConfig, KernelLassoConfig
from rarefy_pruning.sparsity.lasso import CuttingLasso, Lasso, ZeroingLasso
from rarefy_pruning.sparsity.removal import remove_dead
from rarefy_pruning.sparsity.slices import scale_
from rarefy_schemas import Finetune
from torch import nn

SGD = {"epochs": 5, "lr": 0.05, "optimizer": "sgd"}


def resnet() -> ResNet:
    torch.manual_seed(0)
    return ResNet(1, 10, 1, 8, "project")


def train(technique: Lasso[Any], model: nn.Module, task: ClassificationTask) -> nn.Module:
    """Do what the pipeline does, but for the end."""
    technique.seed = 1
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    fit(changed, model, task, technique.config.finetune, rules_for(technique, changed), seed=1)
    return changed.eval()


def difference(one: nn.Module, other: nn.Module, task: ClassificationTask) -> float:
    inputs = task.example_inputs(100)
    with torch.no_grad():
        return float((one.eval()(*inputs) - other.eval()(*inputs)).abs().max())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class TestCutting:
    @pytest.mark.parametrize("structure", ["unit", "filter", "channel"])
    @pytest.mark.parametrize("method", ["proximal", "penalty"])
    def test_structures_die_and_the_cut_changes_nothing(
        self, trained_digits: nn.Module, digits_task: ClassificationTask, structure: str, method: str
    ) -> None:
        strength = 0.002 if structure == "unit" else 0.004
        technique = CuttingLasso(GroupLassoConfig(structure=structure, method=method, strength=strength, finetune=SGD))
        trained = train(technique, trained_digits, digits_task)
        whole = copy.deepcopy(trained)
        compact = technique.consolidate(trained)
        assert parameters(compact) < 0.5 * parameters(trained_digits)
        assert digits_task.score(compact, "validation") > 0.92
        # what a penalty left near zero is rounded to zero
        assert difference(whole, compact, digits_task) < (1e-5 if method == "proximal" else 0.3)
        cut = trained_digits.conv1.out_channels + trained_digits.conv2.out_channels + trained_digits.fc1.out_features
        cut -= compact.conv1.out_channels + compact.conv2.out_channels + compact.fc1.out_features
        assert cut > 0
        assert f"Units cut: {cut} of 112." in technique.notes

    def test_coupled_layers_of_a_residual_stream_die_together(self, digits_task: ClassificationTask) -> None:
        model = resnet()
        fit(model, model, digits_task, Finetune(epochs=4, lr=3e-3))
        technique = CuttingLasso(GroupLassoConfig(strength=0.006, finetune={**SGD, "epochs": 6}))
        trained = train(technique, model, digits_task)
        stream = technique.found.dependencies["stage2.0.conv2"]
        named = dict(trained.named_parameters())
        slices = [
            named[m.tensor].movedim(m.dim, 0).reshape(stream.units, -1) for m in stream.members if m.tensor in named
        ]
        assert len(slices) == 8
        dead = torch.stack([(part == 0).all(1) for part in slices])
        assert 0 < dead[0].sum() < stream.units
        assert (dead == dead[0]).all()
        compact = technique.consolidate(copy.deepcopy(trained))
        assert compact.stage2[0].conv2.out_channels == stream.units - int(dead[0].sum())
        assert compact.stage2[0].shortcut[0].out_channels == compact.stage2[0].conv2.out_channels
        assert difference(trained, compact, digits_task) < 1e-5
        assert digits_task.score(compact, "validation") > 0.8

    def test_one_unit_stays_of_each_group_and_it_is_said(
        self, trained_digits: nn.Module, digits_task: ClassificationTask
    ) -> None:
        technique = CuttingLasso(GroupLassoConfig(strength=100.0, finetune={"epochs": 1, "max_steps": 5}))
        trained = train(technique, trained_digits, digits_task)
        compact = technique.consolidate(copy.deepcopy(trained))
        assert (compact.conv1.out_channels, compact.conv2.out_channels, compact.fc1.out_features) == (1, 1, 1)
        assert difference(trained, compact, digits_task) < 1e-5
        assert "All units of conv1, conv2, fc1 died, and one of each was kept: lower `strength`." in technique.notes

    def test_when_nothing_dies_it_is_said(self, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
        technique = CuttingLasso(GroupLassoConfig(strength=1e-9, finetune={"epochs": 1, "max_steps": 2}))
        trained = train(technique, trained_digits, digits_task)
        assert technique.consolidate(trained) is trained
        assert "Dead after training: 0 of 112 units; raise `strength`, or train longer." in technique.notes

    def test_the_notes_are_in_the_report(
        self, trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
    ) -> None:
        step = {"technique": "pruning/group-lasso", "strength": 0.002, "finetune": SGD}
        recipe = load_recipe({"steps": [step], "evaluate": {"batch_sizes": [], "rounds": 3}})
        done = run(recipe, tmp_path / "run", model=trained_digits, task=digits_task)
        stage = done.report.steps[0]
        assert any(note.startswith("Units cut: ") for note in stage.notes)
        assert stage.value("parameters") < done.report.baseline.value("parameters")


class TestWhatIsDead:
    """Without training: units that hand-made zeros kill."""

    @staticmethod
    def network(padding: int, bias: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            OrderedDict(
                first=nn.Conv2d(1, 4, 3, bias=False),
                norm=nn.BatchNorm2d(4),
                act=nn.ReLU(),
                second=nn.Conv2d(4, 6, 3, padding=padding, bias=bias),
                act2=nn.ReLU(),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                head=nn.Linear(6, 3),
            )
        )
        nn.init.uniform_(model.norm.bias, 0.2, 1.0)
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8))
        return model.eval()

    @staticmethod
    def cut(model: nn.Module, *groups: str) -> tuple[Any, float]:
        inputs = (torch.randn(5, 1, 8, 8),)
        removed = remove_dead(model, inputs, find_dependencies(model, inputs), groups)
        with torch.no_grad():
            return removed, float((model(*inputs) - removed.model(*inputs)).abs().max())

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_constant_behind_a_dead_filter_goes_into_the_bias_of_its_reader(self, bias: bool) -> None:
        model = self.network(0, bias)
        with torch.no_grad():
            model.first.weight[1] = 0
        removed, off = self.cut(model, "first")
        assert (removed.model.first.out_channels, removed.model.second.in_channels) == (3, 3)
        assert off < 1e-6
        assert removed.model.second.bias is not None

    def test_a_reader_may_lose_outputs_and_get_a_bias_at_once(self) -> None:
        model = self.network(0, bias=False)
        with torch.no_grad():
            model.first.weight[1] = 0
            model.second.weight[:2] = 0
        removed, off = self.cut(model, "first", "second")
        # the constant reaches them still, but what they make of it is nothing
        assert removed.model.second.weight.shape[:2] == (4, 3)
        assert removed.model.second.bias.shape == (4,)
        assert off < 1e-6

    def test_a_constant_beside_a_border_of_zeros_stays(self) -> None:
        model = self.network(1, bias=True)
        with torch.no_grad():
            model.first.weight[1] = 0
        removed, off = self.cut(model, "first")
        assert removed.model.first.out_channels == 4
        assert (removed.died["first"], removed.cut["first"]) == (1, 0)
        assert off == 0

    def test_a_channel_that_is_zero_there_goes(self) -> None:
        model = self.network(1, bias=True)
        with torch.no_grad():
            model.first.weight[1] = 0
            model.norm.bias[1] = -0.5
            model.norm.running_mean[1] = 0
        removed, off = self.cut(model, "first")
        assert removed.model.first.out_channels == 3
        assert off < 1e-6

    def test_what_nobody_reads_is_dead(self) -> None:
        model = self.network(1, bias=True)
        with torch.no_grad():
            model.second.weight[:, 2] = 0
        removed, off = self.cut(model, "first")
        assert removed.cut["first"] == 1
        assert off < 1e-6

    def test_what_only_makes_the_unread_is_dead_too(self) -> None:
        class Bottleneck(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(5, 4, 1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 5, 1)
                self.head = nn.Conv2d(5, 2, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.head(x + self.c(self.b(self.a(x).relu()).relu()))
                return y

        torch.manual_seed(0)
        model, inputs = Bottleneck(), (torch.randn(5, 5, 6, 6),)
        with torch.no_grad():
            model.c.weight.zero_()
            before = model(*inputs)
            weights = {name: weight.clone() for name, weight in model.named_parameters()}
            removed = remove_dead(model, inputs, find_dependencies(model, inputs), ["a", "b"])
            assert torch.allclose(before, removed.model(*inputs), atol=1e-6)
        assert removed.cut == {"a": 3, "b": 2}
        assert (removed.model.a.out_channels, removed.model.b.out_channels) == (1, 1)
        assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())

    def test_what_something_without_weights_reads_is_left(self) -> None:
        class Gram(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.a(x)
                return self.b(y) + (y * y.flip(0)).sum(1, keepdim=True)

        torch.manual_seed(0)
        model, inputs = Gram(), (torch.randn(5, 4),)
        with torch.no_grad():
            model.b.weight[:, 2] = 0
        dependencies = find_dependencies(model, inputs)
        assert [group.name for group in dependencies.groups] == ["a"]
        removed = remove_dead(model, inputs, dependencies, ["a"])
        assert removed.model is model
        assert (removed.died["a"], removed.cut["a"]) == (1, 0)


class TestZeros:
    def test_columns_die_over_all_filters(self, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
        config = KernelLassoConfig(strength=0.004, finetune=SGD)
        technique = ZeroingLasso(config)
        compact = technique.consolidate(train(technique, trained_digits, digits_task))
        columns = compact.conv2.weight.flatten(1)
        dead = (columns == 0).all(0)
        assert 0 < dead.sum() < len(dead)
        # whole columns or nothing
        assert (columns[:, ~dead] != 0).all()
        assert compact.conv2.weight.shape == trained_digits.conv2.weight.shape
        assert digits_task.score(compact, "validation") > 0.9


class TestDepth:
    def test_only_layers_beside_a_shortcut_die_and_what_they_read_is_cut(self, digits_task: ClassificationTask) -> None:
        config = GroupLassoConfig(structure="depth", strength=1.0, finetune={"epochs": 4, "lr": 3e-3})
        technique, model = CuttingLasso(config), resnet()
        analysis = technique.analyze(model, digits_task)
        assert {layer.name for layer in analysis.skipped} == {"conv", "fc"}
        assert "no shortcut" in analysis.skipped[0].reason
        assert {layer.action for layer in analysis.layers} == {"train the whole layer to die"}
        trained = train(technique, model, digits_task)
        convolutions = {n: m.weight for n, m in trained.named_modules() if isinstance(m, nn.Conv2d)}
        dead = {name for name, weight in convolutions.items() if not weight.any()}
        assert all((weight != 0).all() for name, weight in convolutions.items() if name not in dead)
        compact = technique.consolidate(copy.deepcopy(trained))
        assert any(all(name in note for name in dead) for note in technique.notes)
        assert not any("strength" in note for note in technique.notes)
        assert difference(trained, compact, digits_task) < 1e-5
        ends = [name for name in dead if name.endswith("conv2")]
        assert ends
        for name in ends:
            assert compact.get_submodule(name).in_channels == 1
            assert compact.get_submodule(name.replace("conv2", "conv1")).out_channels == 1
        inputs = digits_task.example_inputs(1)
        assert flops(compact, inputs) < flops(model, inputs) * (1 - 0.25 * len(ends))

    def test_when_all_die_it_is_said(self, digits_task: ClassificationTask) -> None:
        config = GroupLassoConfig(structure="depth", strength=1000.0, finetune={"epochs": 1, "max_steps": 5})
        technique = CuttingLasso(config)
        trained = train(technique, resnet(), digits_task)
        compact = technique.consolidate(copy.deepcopy(trained))
        assert difference(trained, compact, digits_task) < 1e-5
        assert "Dead after training: 8 of 8 whole layers; lower `strength`." in technique.notes

    def test_a_plain_network_has_no_layer_to_lose(
        self, trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
    ) -> None:
        step = {"technique": "pruning/group-lasso", "structure": "depth", "strength": 1.0, "finetune": {"epochs": 1}}
        recipe = load_recipe({"steps": [step], "evaluate": {"batch_sizes": [], "rounds": 3}})
        with pytest.raises(StageError, match=r"would change nothing(.|\n)*no shortcut"):
            run(recipe, tmp_path / "run", model=trained_digits, task=digits_task)


class TestTargets:
    def test_a_group_goes_only_when_all_its_layers_are_targets(self, digits_task: ClassificationTask) -> None:
        config = GroupLassoConfig(
            strength=1.0, finetune={"epochs": 1}, targets={"exclude": ["stage2.0.shortcut.*", "stage1.0.conv1"]}
        )
        analysis = CuttingLasso(config).analyze(resnet(), digits_task)
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert "'stage2.0.shortcut.0', which is no target" in reasons["stage2.0.conv2"]
        assert "output" in reasons["fc"]
        assert not {"stage1.0.conv1", "stage1.0"} & {part.name for part in analysis.plan.structures}

    def test_normalised_streams_are_left_alone(self, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.LayerNorm(16),
            nn.ReLU(),
            nn.Linear(16, 12),
            nn.ReLU(),
            nn.Linear(12, 10),
        )
        analysis = CuttingLasso(GroupLassoConfig(strength=1.0, finetune={"epochs": 1})).analyze(model, digits_task)
        assert [layer.name for layer in analysis.layers] == ["4"]
        assert "mean or a variance" in next(layer.reason for layer in analysis.skipped if layer.name == "1")

    def test_filters_count_with_their_biases(self, trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
        config = GroupLassoConfig(structure="filter", strength=1.0, finetune={"epochs": 1})
        plan = CuttingLasso(config).analyze(trained_digits, digits_task).plan
        sizes = {part.name: part.sizes(dict(trained_digits.named_parameters())) for part in plan.structures}
        assert sizes["conv1"].tolist() == [9 + 1] * 16
        assert sizes["fc1"].tolist() == [32 * 16 + 1] * 64

    def test_channels_behind_a_flatten_are_all_their_columns(
        self, trained_digits: nn.Module, digits_task: ClassificationTask
    ) -> None:
        config = GroupLassoConfig(structure="channel", strength=1.0, finetune={"epochs": 1})
        plan = CuttingLasso(config).analyze(trained_digits, digits_task).plan
        sizes = {part.name: part.sizes(dict(trained_digits.named_parameters())) for part in plan.structures}
        assert sizes["fc1"].tolist() == [16 * 64] * 32

    def test_channels_of_grouped_convolutions_go_by_whole_groups(self) -> None:
        config = GroupLassoConfig(strength=1.0, finetune={"epochs": 1})
        plan = CuttingLasso(config).analyze(small_model(), small_task()).plan
        assert {part.name: len(part) for part in plan.structures} == {"stem": 2, "wide": 32, "hidden": 48}

    def test_depthwise_convolutions_die_with_what_feeds_them(self, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6)),
            *(
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Conv2d(6, 8, 1),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(8, 10),
            ),
        )
        technique = CuttingLasso(GroupLassoConfig(strength=1.0, finetune={"epochs": 1}))
        changed = technique.transform(model, technique.analyze(model, digits_task), digits_task)
        (unit,) = (part for part in technique.found.structures if part.name == "0")
        assert unit.sizes(dict(model.named_parameters())).tolist() == [9 + 1 + 2 + 9 + 1 + 2 + 8] * 6
        scale_(unit, dict(changed.named_parameters()), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]))
        compact = technique.consolidate(copy.deepcopy(changed))
        assert (compact[0].out_channels, compact[3].groups, compact[6].in_channels) == (4, 4, 4)
        assert difference(changed, compact, digits_task) < 1e-6


class TestBadInput:
    @pytest.mark.parametrize("strength", [0, -0.1, float("nan"), float("inf")])
    def test_strengths_that_are_not_positive_are_refused(self, strength: float) -> None:
        with pytest.raises(ValidationError, match="strength"):
            GroupLassoConfig(strength=strength, finetune={"epochs": 1})

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({}, "give `finetune`"),
            ({"finetune": {"epochs": 0}}, "give `finetune`"),
            ({"finetune": {"keep": "best"}}, "keep: last"),
            ({"finetune": {"patience": 2}}, "patience"),
            ({"finetune": {}, "threshold": 0.1}, "belongs to `method: penalty`"),
            ({"finetune": {}, "structure": "shape"}, "'unit', 'filter', 'channel' or 'depth'"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            GroupLassoConfig(strength=1.0, **options)

    def test_weights_that_are_not_finite_are_refused(
        self, trained_digits: nn.Module, digits_task: ClassificationTask
    ) -> None:
        with torch.no_grad():
            trained_digits.conv2.weight[0, 0, 0, 0] = float("nan")
        with pytest.raises(StageError, match=r"'conv2'.*NaN"):
            CuttingLasso(GroupLassoConfig(strength=1.0, finetune={"epochs": 1})).analyze(trained_digits, digits_task)

    def test_a_model_of_one_layer_has_nothing_to_cut(self, digits_task: ClassificationTask) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        technique = CuttingLasso(GroupLassoConfig(strength=1.0, finetune={"epochs": 1}))
        analysis = technique.analyze(model, digits_task)
        assert not analysis.layers
        assert [layer.name for layer in analysis.skipped] == ["1"]
        changed = technique.transform(model, analysis, digits_task)
        assert technique.training_rule(changed) is None
        assert technique.consolidate(changed) is changed


class TestUnitConformance(TechniqueConformance):
    config = GroupLassoConfig(strength=0.5, finetune=Finetune(lr=0.1, optimizer="sgd"))


class TestFilterConformance(TechniqueConformance):
    config = GroupLassoConfig(structure="filter", strength=0.5, finetune=Finetune(lr=0.1, optimizer="sgd"))


class TestChannelConformance(TechniqueConformance):
    config = GroupLassoConfig(
        structure="channel", method="penalty", strength=0.5, finetune=Finetune(lr=0.1, optimizer="sgd"), threshold=0.05
    )


class TestShapeConformance(TechniqueConformance):
    config = KernelLassoConfig(strength=0.5, finetune=Finetune(lr=0.1, optimizer="sgd"))


class TestDepthConformance(TechniqueConformance):
    config = GroupLassoConfig(structure="depth", strength=1.0, finetune=Finetune(lr=0.1, optimizer="sgd"))

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return ResNet(1, 4, 2, 4, "project").eval()
