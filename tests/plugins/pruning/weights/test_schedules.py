"""Patterns, rows, thresholds and rounds: how many weights stay where, and when."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy import artifact
from rarefy.modules import Base
from rarefy.nouns import implement
from rarefy.tasks import ClassificationTask
from rarefy_pruning.weights.config import MagnitudeConfig, SnipConfig, WandaConfig, WeightPruning
from rarefy_pruning.weights.dropout import Dropouts
from rarefy_pruning.weights.magnitude import Magnitude
from rarefy_pruning.weights.schedules import Rounds
from torch import nn

EPOCH = {"epochs": 1}


def zeros(model: nn.Module) -> list[int]:
    return [int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


class TestPattern:
    @pytest.mark.parametrize("kind", [MagnitudeConfig, WandaConfig, SnipConfig])
    @pytest.mark.parametrize("schedule", [{}, {"schedule": "cubic"}, {"schedule": "iterative", "rounds": 2}])
    def test_two_of_four_stay_for_every_criterion_and_schedule(
        self, kind: type[WeightPruning], schedule: dict[str, Any], compress: Any, make_task: Any
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 12))
        task = make_task(torch.randn(48, 8, 4, 4), torch.arange(48) % 12)
        pruned = compress(model, kind(pattern="2:4", finetune=EPOCH if schedule else None, **schedule), task)
        assert bool(((pruned[0].weight != 0).view(6, 2, 4, 3, 3).sum(2) == 2).all())
        assert bool(((pruned[3].weight != 0).view(12, 6, 4).sum(2) == 2).all())

    def test_the_largest_of_each_block_stay_as_they_are(self, compress: Any) -> None:
        model = nn.Sequential(nn.Linear(6, 1))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, -4, 3, 2, 0.1, 0.2]]))
        # the last block has two inputs, and two may stay
        expected = torch.tensor([[0.0, -4, 3, 0, 0.1, 0.2]])
        assert torch.equal(compress(model, MagnitudeConfig(pattern="2:4"), None)[0].weight, expected)

    def test_zeros_that_are_there_already_count(self, compress: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 2))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[0.0, 1, 0, 3], [1.0, 0, 3, 2]]))
        technique = Magnitude(MagnitudeConfig(pattern="2:4"))
        (layer,) = technique.analyze(model, None).layers  # type: ignore[arg-type]
        assert layer.action == "keep 4 of 5 weights (50.0%)"
        pruned = compress(model, MagnitudeConfig(pattern="2:4"), None)
        assert pruned[0].weight.tolist() == [[0, 1, 0, 3], [0, 0, 3, 2]]

    def test_layers_that_fit_already_are_told(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))
        analysis = Magnitude(MagnitudeConfig(pattern="2:4")).analyze(model, None)  # type: ignore[arg-type]
        assert [layer.name for layer in analysis.layers] == ["1"]
        (skipped,) = analysis.skipped
        assert skipped.name == "0"
        assert skipped.reason == "no block of 4 input channels has more than 2 weights that are not zero"

    @pytest.mark.parametrize("pattern", ["4:2", "0:4", "a", "4:4", "2:", "2:4:8", "-1:4", "2 : 4", "1.5:4", ""])
    def test_bad_patterns_are_refused_with_the_form(self, pattern: str) -> None:
        with pytest.raises(ValidationError, match="n:m with 0 < n < m, such as 2:4"):
            MagnitudeConfig(pattern=pattern)

    @pytest.mark.parametrize("other", [{"amount": 0.5}, {"per_layer": {"0": 0.5}}, {"sensitivity": 1.0}])
    def test_it_excludes_other_targets(self, other: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="leave out `amount`, `sensitivity` and `per_layer`"):
            MagnitudeConfig(pattern="2:4", **other)


class TestRows:
    def test_each_output_loses_the_same_number(self, compress: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1))
        with torch.no_grad():
            model[0].weight[0] *= 1e-3
        pruned = compress(model, MagnitudeConfig(amount=0.4, scope="row"), None)
        assert (pruned[0].weight == 0).flatten(1).sum(1).tolist() == [round(0.4 * 27)] * 5
        assert (pruned[1].weight == 0).flatten(1).sum(1).tolist() == [2] * 4

    def test_each_keeps_its_largest(self, compress: Any) -> None:
        pruned = compress(nn.Sequential(nn.Linear(3, 4)), MagnitudeConfig(amount=0.95, scope="row"), None)
        assert (pruned[0].weight != 0).sum(1).tolist() == [1] * 4

    def test_per_layer_shares_are_shares_of_each_row(self, compress: Any) -> None:
        model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4))
        pruned = compress(model, MagnitudeConfig(amount=0.5, per_layer={"0": 0.7}, scope="row"), None)
        assert (pruned[0].weight == 0).sum(1).tolist() == [7] * 4
        assert (pruned[1].weight == 0).sum(1).tolist() == [2] * 4


class TestSensitivity:
    def test_what_is_below_so_many_deviations_goes(self, model: nn.Module, compress: Any) -> None:
        with torch.no_grad():
            model[2].weight.mul_(50)
        pruned = compress(model, MagnitudeConfig(sensitivity=0.8), None)
        for layer in (0, 2):
            weight = model[layer].weight.detach()
            low = weight.abs() < 0.8 * weight.std(correction=0)
            assert 0 < int(low.sum()) < weight.numel()
            assert torch.equal(pruned[layer].weight == 0, low)

    @pytest.mark.parametrize("schedule", [{"schedule": "iterative", "rounds": 3}, {"schedule": "cubic"}, {}])
    def test_the_share_is_taken_once_however_long_it_takes(
        self, schedule: dict[str, Any], model: nn.Module, blobs: ClassificationTask, compress: Any
    ) -> None:
        at_once = zeros(compress(model, MagnitudeConfig(sensitivity=0.6), None))
        finetune = {"epochs": 4, "lr": 0.05}
        assert zeros(compress(model, MagnitudeConfig(sensitivity=0.6, finetune=finetune, **schedule), blobs)) == at_once

    def test_layers_of_per_layer_have_their_own_share(self, model: nn.Module, compress: Any) -> None:
        pruned = compress(model, MagnitudeConfig(sensitivity=0.5, per_layer={"2": 0.25}), None)
        assert zeros(pruned)[1] == 12

    def test_a_large_one_leaves_a_weight_and_none_below_is_told(self, compress: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            model[1].weight.fill_(1.0)
        technique = Magnitude(MagnitudeConfig(sensitivity=100))
        assert [layer.name for layer in technique.analyze(model, None).layers] == ["0"]  # type: ignore[arg-type]
        assert zeros(compress(model, MagnitudeConfig(sensitivity=100), None)) == [15, 0]

    def test_it_excludes_amount(self) -> None:
        with pytest.raises(ValidationError, match="leave one out"):
            MagnitudeConfig(amount=0.5, sensitivity=1.0)


class TestRounds:
    def test_each_removes_the_same_share_of_what_is_left(self) -> None:
        rounds = Rounds(3)
        kept = [1 - rounds.sparsity(0.2, 0.9, update) for update in (1, 2, 3)]
        assert kept[1] / kept[0] == pytest.approx(kept[0] / 0.8)
        assert kept[2] / kept[1] == pytest.approx(kept[1] / kept[0])
        assert kept[2] == pytest.approx(0.1)

    def test_they_begin_with_the_first_step_and_leave_time_to_retrain(self, model: nn.Module) -> None:
        config = MagnitudeConfig(amount=0.875, scope="layer", schedule="iterative", rounds=3, finetune=EPOCH)
        technique: Magnitude = implement(config)
        rule = technique.training_rule(model)
        before = model[0].weight.detach().clone()
        counts = []
        for step in range(1, 13):
            rule.after_step(model, step / 12)
            counts.append(zeros(model))
        # 96 and 48 weights halve in each round
        assert counts == [[48, 24]] * 3 + [[72, 36]] * 4 + [[84, 42]] * 5
        kept = model[0].weight != 0
        assert torch.equal(model[0].weight[kept], before[kept])

    def test_a_short_fine_tuning_still_ends_with_the_amount(
        self, model: nn.Module, blobs: ClassificationTask, compress: Any
    ) -> None:
        config = MagnitudeConfig(amount=0.75, schedule="iterative", rounds=6, finetune={"epochs": 1, "max_steps": 2})
        assert sum(zeros(compress(model, config, blobs))) == 108

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"rounds": 3}, "`rounds` belongs to `schedule: iterative`"),
            ({"schedule": "iterative"}, "give `finetune`"),
            ({"schedule": "iterative", "finetune": {"keep": "best"}}, "keep: last"),
            ({"schedule": "iterative", "finetune": {}, "rounds": 1}, "greater than or equal to 2"),
            ({"schedule": "iterative", "finetune": {}, "updates": 3}, "belong to `schedule: cubic`"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            MagnitudeConfig(amount=0.5, **options)


class Dropping(nn.Module):
    """Registers its dropout in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Dropout(0.5), nn.Dropout(0.2)
        self.one, self.two, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.unused = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.relu(self.one(x)))
        return self.out(self.last(torch.relu(self.two(x))))  # type: ignore[no-any-return]


class TestDropout:
    config = MagnitudeConfig(per_layer={"two": 0.75}, schedule="iterative", rounds=2, finetune=EPOCH)

    def test_it_falls_by_the_root_of_the_connections_left(self, blobs: ClassificationTask) -> None:
        torch.manual_seed(0)
        technique: Magnitude = implement(self.config)
        model: Any = technique.transform(Dropping(), technique.analyze(Dropping(), blobs), blobs)
        assert (model.last.p, model.first.p) == (0.5, 0.2)
        rule = technique.training_rule(model)
        rates = []
        for progress in (0.25, 0.5, 1.0):
            rule.after_step(model, progress)
            rates.append(model.last.p)
        # half of the connections stay after the first round, a quarter after the second
        assert rates == pytest.approx([0.5 * math.sqrt(0.5), 0.25, 0.25])
        assert (model.first.p, model.unused.p) == (0.2, 0.3)
        technique.consolidate(model)
        assert technique.notes == ["Dropout 'last' went from 0.500 to 0.250, by the connections left before it."]

    def test_the_rate_stays_with_the_model_and_in_its_file(
        self, blobs: ClassificationTask, compress: Any, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        model = Dropping()
        pruned = compress(model, self.config, blobs)
        assert pruned.last.p == 0.25
        base = Base(Dropping)
        artifact.write(pruned, base, tmp_path / "model.rarefy")
        assert artifact.load(tmp_path / "model.rarefy", base=Dropping).last.p == 0.25

    def test_two_prunings_are_one_with_all_the_connections(self, blobs: ClassificationTask, compress: Any) -> None:
        torch.manual_seed(0)
        again = self.config.model_copy(update={"per_layer": {"two": 0.9375}})
        twice = compress(compress(Dropping(), self.config, blobs), again, blobs)
        assert twice.last.p == pytest.approx(0.5 * math.sqrt(0.0625))

    def test_one_used_behind_several_layers_belongs_to_all(self) -> None:
        class Shared(Dropping):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.out(self.last(self.two(self.last(self.one(x)))))  # type: ignore[no-any-return]

        model = Shared()
        inputs = (torch.zeros(1, 6),)
        assert Dropouts(model, inputs, ["two"]).layers == {}
        both = Dropouts(model, inputs, ["one", "two", "out"])
        assert both.layers == {"last": {"one", "two"}}
        with torch.no_grad():
            model.one.weight.zero_()
        both.adjust_(model)
        assert model.last.p == pytest.approx(0.5 * math.sqrt(256 / (256 + 96)))

    def test_looking_leaves_no_trace(self) -> None:
        model = Dropping().train()
        before = copy.deepcopy(model.state_dict())
        Dropouts(model, (torch.zeros(1, 6),), ["two"])
        assert model.training
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_other_schedules_leave_it(self, blobs: ClassificationTask, compress: Any) -> None:
        pruned = compress(Dropping(), MagnitudeConfig(per_layer={"two": 0.75}, finetune=EPOCH), blobs)
        assert pruned.last.p == 0.5


@pytest.mark.parametrize("target", [{"amount": 0.5, "scope": "layer"}, {"amount": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("schedule", ["one-shot", "cubic", "iterative"])
def test_a_layer_that_starts_at_zero_is_skipped_and_may_learn(
    target: dict[str, Any], schedule: Any, blobs: ClassificationTask, compress: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    nn.init.zeros_(model[2].weight)
    config = MagnitudeConfig(schedule=schedule, finetune={"epochs": 2, "lr": 0.02}, **target)
    assert [layer.name for layer in implement(config).analyze(model, blobs).skipped] == ["2"]
    assert zeros(compress(model, config, blobs)) == [48 if "amount" in target else 32, 0]
