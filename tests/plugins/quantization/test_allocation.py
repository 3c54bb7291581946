"""Bits per layer under a budget: against exhaustive search, and on a trained network against the same bits for all."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy_quantization import allocation
from rarefy_quantization.allocation import best_within
from rarefy_quantization.config import GPTQConfig, GridQuantization, UniformConfig
from rarefy_quantization.rounding.config import AdaRoundConfig
from torch import nn


def random_problem(items: int, choices: int, seed: int) -> tuple[Any, Any]:
    draw = np.random.default_rng(seed)
    costs = (draw.integers(1, 50, (items, 1)) * np.arange(2, 2 + choices)).tolist()
    return costs, draw.exponential(size=(items, choices)).tolist()


def total(table: Any, picks: Any) -> float:
    return sum(row[pick] for row, pick in zip(table, picks, strict=True))


def exhaustive(costs: Any, effects: Any, budget: int) -> float:
    all_picks = itertools.product(*(range(len(row)) for row in costs))
    return min(total(effects, picks) for picks in all_picks if total(costs, picks) <= budget)


class TestSearch:
    @pytest.mark.parametrize("seed", range(10))
    def test_it_is_the_best_of_all_choices_at_every_budget(self, seed: int) -> None:
        costs, effects = random_problem(5, 4, seed)
        least, most = (sum(f(row) for row in costs) for f in (min, max))
        for budget in np.linspace(least, most, 7).astype(int).tolist():
            picks = best_within(costs, effects, budget)
            assert total(costs, picks) <= budget
            assert total(effects, picks) == pytest.approx(exhaustive(costs, effects, budget))

    def test_with_many_items_what_is_left_out_costs_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        costs, effects = random_problem(30, 4, 0)
        budget = sum(row[1] for row in costs)
        exact = best_within(costs, effects, budget)
        monkeypatch.setattr(allocation, "_MOST", 60)
        coarse = best_within(costs, effects, budget)
        assert total(costs, coarse) <= budget
        assert total(effects, exact) <= total(effects, coarse) <= 1.2 * total(effects, exact)

    def test_of_equal_effects_it_takes_the_cheapest(self) -> None:
        assert best_within([[2, 3, 4], [2, 3, 4]], [[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]], 8) == [0, 1]


def analysis(model: nn.Module, task: Any, config: Any) -> Any:
    return implement(config).analyze(model, task)


def bits_of(found: Any) -> dict[str, int]:
    return {layer.name: int(layer.scores["bits"]) for layer in found.layers}


def quantized(model: nn.Module, config: Any, task: Any) -> nn.Module:
    technique = implement(config)
    return technique.transform(copy.deepcopy(model), technique.analyze(model, task), task).eval()


class TestModels:
    def test_the_codes_fit_and_sensitive_layers_get_more(self, digits_task: Any, trained_digits: nn.Module) -> None:
        for kind, most in itertools.product((UniformConfig, GPTQConfig), (2.5, 3.0)):
            found = bits_of(analysis(trained_digits, digits_task, kind(target={"most": most})))
            sizes = {name: trained_digits.get_submodule(name).weight.numel() for name in found}
            assert sum(sizes[name] * bits for name, bits in found.items()) <= most * sum(sizes.values())
            assert found["conv1"] > found["fc1"]

    def test_bytes_are_eight_bits(self, digits_task: Any, trained_digits: nn.Module) -> None:
        sizes = [m.weight.numel() for m in trained_digits.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        in_bytes = {"measure": "bytes", "most": 3 * sum(sizes) / 8}
        found = [
            bits_of(analysis(trained_digits, digits_task, UniformConfig(target=t))) for t in (in_bytes, {"most": 3})
        ]
        assert found[0] == found[1]

    def test_the_outputs_are_nearer_than_with_as_many_bits_everywhere(
        self, digits_task: Any, trained_digits: nn.Module
    ) -> None:
        x = digits_task.inputs(next(iter(digits_task.loader("validation", 180))))[0]
        chosen, same = (
            quantized(trained_digits, config, digits_task)
            for config in (UniformConfig(target={"most": 3, "choices": (2, 3, 4, 5, 6, 8)}), UniformConfig(bits=3))
        )
        with torch.no_grad():
            errors = [float((model(x) - trained_digits(x)).square().mean()) for model in (chosen, same)]
        assert errors[0] < 0.8 * errors[1]

    @pytest.mark.parametrize("kind", [GPTQConfig, AdaRoundConfig])
    def test_tried_by_rounding_layers_get_the_bits_that_rounding_would_give_them(
        self, kind: type[GridQuantization], digits_task: Any, trained_digits: nn.Module
    ) -> None:
        options = {"per_layer": {"fc2": 4}, "granularity": "tensor", "range": "mse", "symmetric": False}
        asked = {"most": 3, "choices": (2, 3, 4, 5), "tried_by": "rounding"}
        found = analysis(trained_digits, digits_task, kind(target=asked, **options))
        plain = analysis(trained_digits, digits_task, UniformConfig(target=asked, **options))
        assert bits_of(found) == bits_of(plain)
        assert len(set(bits_of(found).values())) > 1

    def test_bits_given_by_hand_stay_and_count(self, digits_task: Any, trained_digits: nn.Module) -> None:
        config = UniformConfig(target={"most": 3, "by": "loss"}, per_layer={"fc1": 2, "conv1": 5})
        assert config.needed_data() == "labelled"
        found = bits_of(analysis(trained_digits, digits_task, config))
        assert (found["fc1"], found["conv1"]) == (2, 5)
        with pytest.raises(StageError, match=r"allows 2\.1 bits .* take 5\.\d"):
            analysis(trained_digits, digits_task, UniformConfig(target={"most": 2.1}, per_layer={"fc1": 6}))

    def test_a_recipe_says_it_in_one_line(self) -> None:
        step = {"technique": "quantization/gptq", "target": {"most": 3.5, "choices": [2, 3, 4]}}
        config = load_recipe({"steps": [step]}).steps[0]
        assert (config.target.most, config.target.choices) == (3.5, (2, 3, 4))
        assert config.needed_data() == "unlabelled"
        assert UniformConfig(target={"most": 3}).needed_data() == "unlabelled"

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"target": {"most": 3}, "bits": 3}, "give one"),
            ({"target": {"most": 0}}, "most"),
            ({"target": {"most": 3, "choices": []}}, "choices"),
            ({"target": {"most": 3, "choices": [1]}}, "choices"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            UniformConfig(**options)
