"""How much is removed, from where, and what is said when that cannot be."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy import compress
from rarefy.dependencies import find_dependencies, mask
from rarefy.errors import StageError
from rarefy.measure import flops, parameters
from rarefy.tasks import ClassificationTask
from rarefy.zoo import digits_cnn, resnet20, vit_tiny
from rarefy_pruning.channels.allocation import lowest, pools, reach, rounded
from rarefy_pruning.channels.choice import Choice
from torch import nn


def size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return vit_tiny(num_classes=3, in_channels=1, size=8, patch=4, width=32, depth=2, num_heads=4).eval()


@pytest.fixture
def images(make_task: Any) -> ClassificationTask:
    return make_task(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


class TestBudgets:
    @pytest.mark.parametrize("scope", ["layer", "global", "alike", "sensitivity"])
    @pytest.mark.parametrize("measure", ["flops", "parameters", "bytes"])
    def test_the_share_is_reached_and_hardly_exceeded(
        self, prune: Any, digits_task: ClassificationTask, measure: str, scope: str
    ) -> None:
        torch.manual_seed(0)
        model = digits_cnn()
        x = digits_task.example_inputs(1)
        target = {"measure": measure, "share": 0.5}
        compact, _, technique = prune(model, digits_task, target=target, scope=scope, sensitivity_batches=1)
        count = {"flops": lambda m: flops(m, x), "parameters": parameters, "bytes": size}[measure]
        share = count(compact) / count(model)
        # a step by share takes a unit of every layer, so a sixteenth of the narrowest
        assert 0.5 - 0.1 < share <= 0.5
        assert not technique.notes

    def test_whole_multiples_stay_in_wide_groups_only(self, prune: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 160), nn.ReLU(), nn.Linear(160, 30), nn.ReLU(), nn.Linear(30, 3))
        compact, _, _ = prune(model, make_task(torch.randn(9, 4)), amount=0.29)
        assert (compact[0].out_features, compact[2].out_features) == (120, 30 - round(0.29 * 30))
        assert rounded(113, 128, 8) == 120
        assert rounded(113, 127, 8) == 113
        assert rounded(126, 130, 8) == 128

    def test_a_target_out_of_reach_is_noted(self, prune: Any, digits_task: ClassificationTask) -> None:
        compact, _, technique = prune(digits_cnn(), digits_task, target={"share": 0.01}, least=0.5)
        assert compact.conv1.out_channels == 8
        assert len(technique.notes) == 1
        assert "1.0% was asked for" in technique.notes[0]
        assert "lower `least`" in technique.notes[0]

    @pytest.mark.parametrize("scope", ["layer", "global", "alike"])
    def test_one_unit_stays(self, prune: Any, digits_task: ClassificationTask, scope: str) -> None:
        compact, _, _ = prune(digits_cnn(), digits_task, amount=0.99, least=0, scope=scope, normalize="none")
        assert min(compact.conv1.out_channels, compact.conv2.out_channels, compact.fc1.out_features) == 1
        assert compact(digits_task.example_inputs(2)[0]).shape == (2, 10)

    def test_a_share_of_each_layer_stays_however_low_its_scores(
        self, prune: Any, digits_task: ClassificationTask
    ) -> None:
        model = digits_cnn()
        with torch.no_grad():
            model.conv2.weight.mul_(1e-4)
        compact, _, _ = prune(model, digits_task, amount=0.5, scope="global", normalize="none", least=0.25)
        assert compact.conv2.out_channels == 8

    def test_normalized_scores_forget_the_scale_of_a_layer(self, prune: Any, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = digits_cnn()
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.conv2.weight.mul_(1e-4)
        widths = [prune(m, digits_task, amount=0.5, scope="global")[0].conv2.out_channels for m in (model, scaled)]
        assert widths[0] == widths[1]

    @pytest.mark.parametrize(
        ("normalize", "goal", "first"),
        [
            ("none", {"target": {"measure": "parameters", "share": 0.9}}, "0"),
            ("saving", {"target": {"measure": "parameters", "share": 0.9}}, "2"),
            ("saving", {"target": {"measure": "flops", "share": 0.9}}, "2"),
            ("saving", {"amount": 0.25}, "0"),
        ],
    )
    def test_what_saves_more_may_cost_more(
        self, make: Any, make_task: Any, normalize: str, goal: dict[str, Any], first: str
    ) -> None:
        # a unit of the first layer saves 13 parameters and costs 1, one of the second saves 73 and costs 3
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 64))
        task = make_task(torch.randn(6, 4))
        found = find_dependencies(model, task.example_inputs(1))
        scores = {"0": torch.full((8,), 1.0), "2": torch.full((8,), 3.0)}
        config = make("fisher", scope="global", normalize=normalize, least=0, **goal).config
        assert list(Choice(config, model, found, scores, task).removal) == [first]

    def test_like_structures_compete_with_each_other_only(self, prune: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        model = resnet20(width=4)
        task = make_task(torch.randn(6, 3, 16, 16))
        _, analysis, _ = prune(model, task, amount=0.5, scope="alike", least=0, round_to=1, normalize="none")
        found = analysis.plan.dependencies
        inner = [g for g in found.groups if g.name.endswith(".conv1")]
        gone = sum(len(analysis.plan.removal.get(g.name, ())) for g in inner)
        assert gone == pytest.approx(0.5 * sum(g.units for g in inner), abs=len(inner))


class TestLayers:
    def test_patterns_decide_before_the_common_share(self, prune: Any, digits_task: ClassificationTask) -> None:
        compact, _, _ = prune(digits_cnn(), digits_task, amount=0.5, per_layer={"conv1": 0.25, "conv*": 0})
        assert (compact.conv1.out_channels, compact.conv2.out_channels, compact.fc1.out_features) == (12, 32, 32)

    def test_patterns_alone_leave_the_rest(self, prune: Any, digits_task: ClassificationTask) -> None:
        compact, analysis, _ = prune(digits_cnn(), digits_task, per_layer={"fc1": 0.5})
        assert (compact.conv1.out_channels, compact.fc1.out_features) == (16, 32)
        assert {s.name for s in analysis.skipped} == {"conv1", "conv2", "fc2"}

    def test_a_pattern_that_matches_nothing_is_refused(self, prune: Any, digits_task: ClassificationTask) -> None:
        with pytest.raises(StageError, match=r"'conv9'.*conv1, conv2, fc1"):
            prune(digits_cnn(), digits_task, amount=0.5, per_layer={"conv9": 0.2})

    def test_targets_that_match_nothing_are_refused(self, prune: Any, digits_task: ClassificationTask) -> None:
        with pytest.raises(StageError, match=r"no group of channels.*nowhere"):
            prune(digits_cnn(), digits_task, amount=0.5, targets={"include": ["nowhere"]})

    def test_an_excluded_layer_keeps_its_units_and_is_told(self, prune: Any, digits_task: ClassificationTask) -> None:
        compact, analysis, _ = prune(digits_cnn(), digits_task, amount=0.5, targets={"exclude": ["conv2"]})
        assert (compact.conv1.out_channels, compact.conv2.out_channels) == (8, 32)
        assert "is no target" in {s.name: s.reason for s in analysis.skipped}["conv2"]

    def test_a_model_of_which_nothing_may_be_cut_is_refused(self, prune: Any, make_task: Any) -> None:
        with pytest.raises(StageError, match="part of the model's output"):
            prune(nn.Linear(4, 3), make_task(torch.randn(9, 4)), amount=0.5)

    def test_heads_go_whole_or_lose_places(self, prune: Any, images: ClassificationTask) -> None:
        options: dict[str, Any] = {"amount": 0.5, "targets": {"include": ["blocks.*"]}}
        whole, *_ = prune(small_vit(), images, blocks="whole", **options)
        inside, analysis, _ = prune(small_vit(), images, blocks="inside", **options)
        attention = [model.blocks[0].attention for model in (whole, inside)]
        assert [a.num_heads for a in attention] == [2, 4]
        assert [a.qkv.out_features for a in attention] == [48, 48]
        assert [a.project.in_features for a in attention] == [16, 16]
        assert inside(images.example_inputs(2)[0]).shape == (2, 3)
        assert any("another way (see `blocks`)" in s.reason for s in analysis.skipped)

    def test_without_statistics_the_residual_width_stays(self, prune: Any, images: ClassificationTask) -> None:
        kept, analysis, _ = prune(small_vit(), images, amount=0.5, statistics=False)
        cut, *_ = prune(small_vit(), images, amount=0.5)
        assert (kept.patches.out_channels, cut.patches.out_channels) == (32, 16)
        assert (kept.blocks[0].fc1.out_features, cut.blocks[0].fc1.out_features) == (64, 64)
        assert any("`statistics` is false" in s.reason for s in analysis.skipped)


class TestRounds:
    def test_rounds_are_steps_that_end_at_the_share_asked_for(
        self, trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Any
    ) -> None:
        step = {
            "technique": "pruning/channel-l1", "rounds": 2, "target": {"share": 0.36}, "finetune": {"epochs": 1},
        }  # fmt: skip
        recipe = {"steps": [step], "evaluate": {"batch_sizes": []}}
        result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
        before, *after = [stage.value("flops") for stage in (result.report.baseline, *result.report.steps)]
        assert [stage.name for stage in result.report.steps] == [f"pruning/channel-l1 ({i} of 2)" for i in (1, 2)]
        assert 0.5 < after[0] / before <= 0.6
        assert 0.28 < after[1] / before <= 0.36
        assert digits_task.score(result.model, "validation") > 0.8

    def test_rounds_multiply_to_the_amount(self, make: Any) -> None:
        config = make("l1", amount=0.875, per_layer={"a": 0.75}, rounds=3, finetune={}).config
        parts = config.parts()
        assert len(parts) == 3
        assert math.prod(1 - part.amount for part in parts) == pytest.approx(0.125)
        assert math.prod(1 - part.per_layer["a"] for part in parts) == pytest.approx(0.25)


class TestOddModels:
    def test_the_cut_model_is_the_masked_one(self, prune: Any, digits_task: ClassificationTask) -> None:
        torch.manual_seed(0)
        model, x = digits_cnn().eval(), digits_task.example_inputs(4)
        before = copy.deepcopy(model.state_dict())
        compact, analysis, _ = prune(model, digits_task, amount=0.5)
        masked = mask(model, find_dependencies(model, x), analysis.plan.removal)
        torch.testing.assert_close(compact(*x), masked(*x))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize(
        "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["data parallel", "compiled"]
    )
    def test_wrapped_models_are_refused_with_advice(
        self, prune: Any, perceptron: nn.Module, blobs: ClassificationTask, wrap: Any
    ) -> None:
        with pytest.raises(StageError, match=r"pass (its `\.module`|the model given to torch\.compile)"):
            prune(wrap(perceptron), blobs, amount=0.5)

    @pytest.mark.parametrize("name", ["l1", "geometric-median", "taylor", "activation"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, prune: Any, make_task: Any, perceptron: nn.Module, dtype: Any, name: str) -> None:
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = perceptron.to(dtype)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out: torch.Tensor = self.net(x.to(dtype)).float()
                return out

        compact, _, _ = prune(Wrapper(), make_task(torch.randn(20, 6)), name, amount=0.5)
        assert (compact.net[0].weight.shape, compact.net[0].weight.dtype) == ((4, 6), dtype)

    def test_weights_that_are_not_contiguous(self, prune: Any, perceptron: Any, blobs: ClassificationTask) -> None:
        expected, *_ = prune(perceptron, blobs, amount=0.5)
        perceptron[0].weight = nn.Parameter(perceptron[0].weight.detach().t().contiguous().t())
        assert not perceptron[0].weight.is_contiguous()
        compact, *_ = prune(perceptron, blobs, amount=0.5)
        assert torch.equal(compact[0].weight, expected[0].weight)

    def test_tied_weights_stay_tied(self, prune: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        )
        model[4].weight = model[2].weight
        compact, _, _ = prune(model, make_task(torch.randn(9, 4)), amount=0.5)
        assert compact[4].weight is compact[2].weight
        assert compact[2].weight.shape == (3, 3)

    def test_weights_that_are_not_finite_are_refused(
        self, prune: Any, perceptron: Any, blobs: ClassificationTask
    ) -> None:
        perceptron[0].weight.data[0, 0] = float("nan")
        with pytest.raises(StageError, match=r"'0'.*NaN or infinite"):
            prune(perceptron, blobs, amount=0.5)


class TestAllocation:
    def test_equal_scores_go_in_the_order_of_their_units(self) -> None:
        (pool,) = pools({"a": torch.ones(6)}, None)
        assert lowest(pool, 0.5, 0, 1)["a"].tolist() == [0, 1, 2]

    def test_the_smallest_amount_that_reaches_is_found(self) -> None:
        assert reach(0.5, lambda amount: 1 - int(amount * 10) / 10) == pytest.approx(0.5, abs=1e-6)
        assert reach(0.1, lambda amount: 1 - amount / 2) == 1.0

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({}, "give `amount`"),
            ({"amount": 0.5, "target": {"share": 0.5}}, "both say"),
            ({"amount": 0.5, "rounds": 2}, "give `finetune`"),
            ({"amount": 1.0}, "amount"),
            ({"amount": 0.0}, "amount"),
            ({"target": {"share": 0}}, "share"),
            ({"target": {"share": 0.5, "measure": "joules"}}, "measure"),
            ({"target": {"share": 0.5, "batch_size": 0}}, "batch_size"),
            ({"amount": 0.5, "least": 1}, "least"),
            ({"per_layer": {"a": 1.0}}, "per_layer"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        from rarefy_pruning.channels.config import ChannelL1Config

        with pytest.raises(ValidationError, match=told):
            ChannelL1Config(**options)
