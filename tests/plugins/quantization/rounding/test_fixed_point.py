"""Fixed point: its ends, the mean and variance of stochastic rounding, and training that nearest rounding stalls."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy import artifact
from rarefy.errors import StageError
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.training import fit
from rarefy_quantization.rounding.config import FixedPointConfig
from rarefy_quantization.rounding.fixed_point import Format, RoundingRule
from rarefy_schemas import Finetune
from torch import nn

NO_TASK: Any = None


def trained(model: nn.Module, config: FixedPointConfig, task: Any, seed: int = 0) -> nn.Module:
    technique = implement(config)
    technique.seed = seed
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    fit(changed, model, task, config.finetune, rules_for(technique, changed))
    return technique.consolidate(changed).eval()


class Holder(nn.Module):
    """A model that is one parameter."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class TestFormat:
    def test_values_by_hand(self) -> None:
        # steps of 1/4 from -2 to 1.75
        values = torch.tensor([0.1, 0.125, 0.3, -0.125, -0.13, 5.0, 1.9, -7.0, 0.0])
        assert Format(2, 2).round(values).tolist() == [0.0, 0.25, 0.25, 0.0, -0.25, 1.75, 1.75, -2.0, 0.0]
        assert Format(2, 2).saturates(values).tolist() == [False] * 5 + [True, True, True, False]

    def test_stochastic_rounding_is_right_on_average_with_the_variance_of_a_coin(self) -> None:
        count, step = 40_000, 2.0**-5
        for value in (0.3 * step, -0.2 * step, 0.85 - 2.0**-9, 0.5 * step):
            noise = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            rounded = Format(2, 5).round(torch.full((count,), value, dtype=torch.float64), noise)
            share = value / step - math.floor(value / step)
            variance = step**2 * share * (1 - share)
            assert float(rounded.mean()) == pytest.approx(value, abs=4 * math.sqrt(variance / count))
            assert float(rounded.var()) == pytest.approx(variance, rel=0.03)
            assert set(rounded.unique().tolist()) == {step * math.floor(value / step), step * math.ceil(value / step)}

    def test_values_on_the_grid_stay_whatever_the_noise(self) -> None:
        values = torch.arange(-64, 64) / 32
        noise = torch.rand(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.equal(Format(2, 5).round(values, noise), values)


class TestRule:
    def test_the_noise_is_new_at_every_step_and_for_every_tensor_and_disturbs_no_generator(self) -> None:
        def rounded(progress: float, seed: int = 3) -> torch.Tensor:
            model = Holder(torch.full((500,), 0.4))
            RoundingRule(Format(2, 0), ["weight"], seed).after_step(model, progress)
            return model.weight.detach()

        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, again, later, other = rounded(0.1), rounded(0.1), rounded(0.2), rounded(0.1, seed=4)
        assert torch.equal(torch.rand(3), expected)
        assert torch.equal(first, again)
        assert not torch.equal(first, later)
        assert not torch.equal(first, other)
        assert 0.3 < float(first.mean()) < 0.5

    def test_updates_below_half_a_step_are_lost_to_the_nearest_and_add_up_by_chance(self) -> None:
        ends = {}
        for seed in (None, 0):
            model, rule = Holder(torch.zeros(400)), RoundingRule(Format(2, 4), ["weight"], seed)
            for number in range(200):
                with torch.no_grad():
                    model.weight += 0.1 * 2.0**-4
                rule.after_step(model, number / 200)
            ends[seed] = float(model.weight.detach().mean())
        assert ends[None] == 0.0
        assert ends[0] == pytest.approx(200 * 0.1 * 2.0**-4, rel=0.05)


class TestTraining:
    def test_it_learns_where_the_nearest_stalls(self, digits_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        finetune = Finetune(epochs=4, optimizer="sgd", lr=0.03, momentum=0.0, schedule="constant")
        shared = {"integer_bits": 2, "fraction_bits": 6, "finetune": finetune}
        scores = {
            rounding: digits_task.score(
                trained(model, FixedPointConfig(rounding=rounding, **shared), digits_task), "validation"
            )
            for rounding in ("stochastic", "nearest")
        }
        assert scores["stochastic"] > scores["nearest"] + 0.2

    def test_what_remains_is_fixed_point_and_the_same_for_one_seed(self, digits_task: Any, tmp_path: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        config = FixedPointConfig(integer_bits=1, fraction_bits=7, finetune=Finetune(max_steps=5, lr=0.01))
        one, again, other = (trained(model, config, digits_task, seed) for seed in (0, 0, 1))
        for name, tensor in one.named_parameters():
            codes = tensor.detach() * 128
            assert torch.equal(codes, codes.round())
            assert (codes >= -128).all()
            assert (codes <= 127).all()
            assert torch.equal(tensor, again.get_parameter(name))
        assert not torch.equal(one[1].weight, other[1].weight)
        artifact.write(one, as_base(model), tmp_path / "model.rarefy")
        count = sum(p.numel() for p in one.parameters())
        assert (tmp_path / "model.rarefy").stat().st_size < count + 3000

    def test_biases_can_be_left_alone(self, digits_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        config = FixedPointConfig(integer_bits=1, fraction_bits=3, biases=False)
        technique = implement(config)
        changed = technique.transform(copy.deepcopy(model), technique.analyze(model, digits_task), digits_task)
        assert torch.equal(changed[1].bias, model[1].bias)
        assert changed[1].weight.unique().numel() <= 16


class TestBadInput:
    def test_what_cannot_work_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="26 bits"):
            FixedPointConfig(integer_bits=10, fraction_bits=16)
        model = nn.Sequential(nn.Linear(3, 3))
        model[0].bias.data[0] = torch.inf
        with pytest.raises(StageError, match="NaN or infinite"):
            implement(FixedPointConfig()).analyze(model, NO_TASK)
        with pytest.raises(StageError, match="no layer matches"):
            implement(FixedPointConfig(targets={"include": ("nowhere",)})).analyze(model, NO_TASK)

    def test_saturation_is_told(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].weight.data.copy_(torch.tensor([[0.5, 3.0], [-3.0, 0.25]]))
        (layer,) = implement(FixedPointConfig(integer_bits=1, fraction_bits=4)).analyze(model, NO_TASK).layers
        assert layer.action == "<1, 4>, 5 bits"
        assert layer.scores["saturated"] == 0.5
