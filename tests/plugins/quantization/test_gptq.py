"""GPTQ against direct solves and enumeration on small problems, and on trained networks against plain rounding."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.hessian import inverse_factor
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.testing.subjects import Inputs
from rarefy.training import fit
from rarefy_quantization.config import GPTQConfig, UniformConfig
from rarefy_quantization.gptq import sweep
from rarefy_quantization.grids import Grid, Units
from rarefy_schemas import Finetune
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hessian(inputs: int, seed: int = 0, groups: int = 1) -> torch.Tensor:
    x = normal(groups, 3 * inputs, inputs, seed=seed) @ normal(groups, inputs, inputs, seed=seed + 1)
    return x.mT @ x / (3 * inputs)


def fixed(step: float = 0.5, bits: int = 3) -> Any:
    values = (torch.tensor([[[value]]]) for value in (step, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1))
    grid = Grid(*values)
    return lambda weight: grid


def error(change: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return torch.einsum("gri,gij,grj->gr", change, h, change)


def run(weight: torch.Tensor, h: torch.Tensor, fit: Any, block: int = 128, size: int = 0) -> tuple[Any, Any]:
    """Return the weights as they were rounded, and what they were rounded to, with one grid."""
    parts = torch.arange(weight.shape[-1]).split(size or weight.shape[-1])
    swept, grids = sweep(weight, inverse_factor(h), fit, parts, block)
    return swept, torch.cat([grid.snap(swept[..., part]) for grid, part in zip(grids, parts, strict=True)], -1)


def best_given(weight: torch.Tensor, h: torch.Tensor, fixed_: torch.Tensor) -> torch.Tensor:
    """Return the weights of one row with the least error among those that begin with `fixed_`, by a linear solve."""
    count = len(fixed_)
    change = fixed_ - weight[:count]
    return weight[count:] - torch.linalg.solve(h[count:, count:], h[count:, :count] @ change)


class TestSweep:
    @pytest.mark.parametrize("block", [1, 2, 5, 128])
    def test_each_weight_is_rounded_from_where_a_direct_solve_puts_it(self, block: int) -> None:
        weight, h = normal(2, 3, 7), hessian(7, groups=2)
        swept, snapped = run(weight, h, fixed(), block)
        for group, row in product(range(2), range(3)):
            for j in range(7):
                direct = best_given(weight[group, row], h[group], snapped[group, row, :j])
                assert swept[group, row, j].item() == pytest.approx(direct[0].item(), abs=1e-9)

    def test_the_last_of_two_or_three_codes_is_the_best_of_all(self) -> None:
        values = 0.5 * torch.arange(-4.0, 4.0, dtype=torch.float64)
        for seed, inputs in product(range(30), (2, 3)):
            weight, h = normal(1, 1, inputs, seed=seed), hessian(inputs, seed)
            snapped = run(weight, h, fixed())[1]
            others = snapped.expand(1, 8, inputs).clone()
            others[..., -1] = values
            assert error(snapped - weight, h)[0, 0] <= error(others - weight, h).min() + 1e-12

    def test_over_many_problems_it_lies_between_enumeration_and_rounding(self) -> None:
        values = 0.5 * torch.arange(-4.0, 4.0, dtype=torch.float64)
        everything = torch.cartesian_prod(values, values, values)
        totals = torch.zeros(3, dtype=torch.float64)
        for seed in range(60):
            weight, h = 0.7 * normal(1, 1, 3, seed=seed), hessian(3, seed)
            snapped, rounded = run(weight, h, fixed())[1], fixed()(weight).snap(weight)
            totals += torch.stack([error(x - weight, h).min() for x in (everything[None], snapped, rounded)])
        assert totals[0] <= totals[1] <= 0.85 * totals[2]

    def test_without_correlation_it_rounds(self) -> None:
        weight, h = normal(1, 4, 9), torch.diag_embed(normal(1, 9, seed=3).square() + 0.1)
        swept, snapped = run(weight, h, fixed())
        assert torch.equal(swept, weight)
        assert torch.equal(snapped, fixed()(weight).snap(weight))

    def test_zeros_stay_and_are_made_up_for(self) -> None:
        weight, h = normal(1, 20, 12), hessian(12)
        weight[normal(1, 20, 12, seed=5) > 0.3] = 0
        snapped = run(weight, h, fixed(0.2, 4))[1]
        assert not snapped[weight == 0].any()
        rounded = fixed(0.2, 4)(weight).snap(weight)
        assert error(snapped - weight, h).sum() < error(rounded - weight, h).sum()

    @pytest.mark.parametrize("block", [2, 3, 128])
    def test_the_grid_of_a_group_is_fitted_when_it_is_reached(self, block: int) -> None:
        weight, h, seen = normal(1, 1, 6), hessian(6), []

        def fit(part: torch.Tensor) -> Grid:
            seen.append(part.flatten())
            return fixed(0.25, 5)(part)

        snapped = run(weight, h, fit, block, size=2)[1]
        for number in range(3):
            direct = best_given(weight[0, 0], h[0], snapped[0, 0, : 2 * number])
            torch.testing.assert_close(seen[number], direct[:2], rtol=0, atol=1e-9)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(80, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4))


def data(features: int = 80) -> Inputs:
    """Neighbours are alike."""
    return Inputs(*(normal(100, features, seed=seed).float().cumsum(-1) for seed in (1, 2, 3)))


def quantized(model: nn.Module, config: Any, task: Any) -> nn.Module:
    technique = implement(config)
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    if config.finetune is not None:
        fit(changed, model, task, config.finetune, rules=rules_for(technique, changed))
    return technique.consolidate(changed).eval()


def output_error(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).square().mean())


OPTIONS = [
    {"granularity": granularity, "order": order, "symmetric": symmetric}
    for granularity in ("tensor", "channel", "group")
    for order in ("data", "activation")
    for symmetric in (True, False)
]


class TestModels:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_the_error_on_correlated_inputs_is_below_that_of_rounding(self, options: dict[str, Any]) -> None:
        model, task = network(), data()
        shared = {"bits": 3, "group_size": 32, "range": "min-max", "targets": {"include": ("0",)}}
        ours = quantized(model, GPTQConfig(**shared, **options), task)
        others = {name: value for name, value in options.items() if name != "order"}
        plain = quantized(model, UniformConfig(**shared, **others), task)
        x = torch.cat(task.batches)
        assert output_error(ours[0], model[0], x) < 0.1 * output_error(plain[0], model[0], x)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_weights_are_integers_times_steps_bit_for_bit(self, options: dict[str, Any]) -> None:
        model, task = network(), data()
        technique = implement(GPTQConfig(bits=4, group_size=32, **options))
        grids = {}
        solve = technique.solve

        def watch(layer: nn.Module, *rest: Any) -> Any:
            rows, grid = solve(layer, *rest)
            grids[layer] = grid
            return rows, grid

        technique.solve = watch
        changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
        for layer, grid in grids.items():
            units = Units.of(layer.weight.shape, options["granularity"], 32)
            codes = units.split(layer.weight.detach()) / grid.step
            assert torch.equal(codes, codes.round())
            assert ((codes >= grid.low) & (codes <= grid.high)).all()
        assert len(grids) == 3
        assert not torch.equal(changed[0].weight, model[0].weight)

    def test_convolutions_of_all_kinds(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1, groups=2))
        inputs = torch.randn(20, 4, 9, 9, generator=torch.Generator().manual_seed(0)).cumsum(-1)
        task = Inputs(inputs)
        for order in ("data", "activation"):
            shared = {"bits": 3, "range": "min-max"}
            ours = quantized(model, GPTQConfig(**shared, order=order), task)
            assert output_error(ours, model, inputs) < output_error(
                quantized(model, UniformConfig(**shared), task), model, inputs
            )

    def test_a_layer_is_calibrated_behind_those_already_quantized_or_on_the_model_as_it_was(self) -> None:
        model, task = network(), data()
        first = quantized(model, GPTQConfig(bits=2, targets={"include": ("0",)}), task)
        for sequential, before in ((True, first), (False, model)):
            whole = quantized(model, GPTQConfig(bits=2, sequential=sequential), task)
            alone = quantized(before, GPTQConfig(bits=2, targets={"include": ("2",)}), task)
            assert torch.equal(whole[2].weight, alone[2].weight)

    def test_bits_per_layer_and_zeros(self) -> None:
        model = network()
        with torch.no_grad():
            model[0].weight[model[0].weight.abs() < 0.03] = 0
        changed = quantized(model, GPTQConfig(bits=2, per_layer={"2": 6}), data())
        assert not changed[0].weight[model[0].weight == 0].any()
        assert max(row.unique().numel() for row in changed[0].weight) <= 4
        assert max(row.unique().numel() for row in changed[2].weight) > 8

    def test_the_same_data_gives_the_same_result(self) -> None:
        one, again = (quantized(network(), GPTQConfig(), data()).state_dict() for _ in range(2))
        assert all(torch.equal(one[name], again[name]) for name in one)

    def test_half_precision_and_dead_inputs(self) -> None:
        task = data()
        for x in task.batches:
            x[:, [1, 7]] = 0
        model = network()
        changed = quantized(model, GPTQConfig(order="data", range="min-max"), task)
        rounded = quantized(model, UniformConfig(bits=4, range="min-max"), task)
        torch.testing.assert_close(changed[0].weight[:, 1], rounded[0].weight[:, 1])
        half = quantized(network().bfloat16(), GPTQConfig(), Inputs(*(x.bfloat16() for x in task.batches)))
        assert half[0].weight.dtype == torch.bfloat16
        assert max(row.unique().numel() for row in half[0].weight) <= 16

    def test_layers_left_alone_are_told_with_the_reason(self) -> None:
        analysis = implement(GPTQConfig(max_inputs=16)).analyze(network(), data())
        assert [layer.name for layer in analysis.layers] == ["2", "4"]
        assert "80 x 80 and `max_inputs` is 16" in analysis.skipped[0].reason

    def test_a_note_names_the_layer_that_suffers_most(self) -> None:
        technique, model, task = implement(GPTQConfig(bits=2)), network(), data()
        technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
        assert any("relative output error" in note for note in technique.notes)


class TestDigits:
    def test_three_bits_are_better_than_rounding(self, digits_task: Any, trained_digits: nn.Module) -> None:
        x = next(iter(digits_task.loader("validation", 180)))[0]
        full = digits_task.score(trained_digits, "test")
        rounded = quantized(trained_digits, UniformConfig(bits=3, range="min-max"), digits_task)
        ours = quantized(trained_digits, GPTQConfig(bits=3), digits_task)
        errors = [output_error(m, trained_digits, x) for m in (ours, rounded)]
        assert errors[0] < 0.2 * errors[1]
        assert digits_task.score(ours, "test") > full - 0.01

    def test_two_bits_are_far_better_than_rounding(self, digits_task: Any, trained_digits: nn.Module) -> None:
        scores = [
            digits_task.score(quantized(trained_digits, config, digits_task), "test")
            for config in (GPTQConfig(bits=2), UniformConfig(bits=2, range="min-max"))
        ]
        assert scores[0] > scores[1] + 0.1

    def test_fine_tuning_starts_from_what_was_found(self, digits_task: Any, trained_digits: nn.Module) -> None:
        still = GPTQConfig(bits=2, finetune=Finetune(max_steps=1, lr=1e-12))
        plain, same = (quantized(trained_digits, c, digits_task) for c in (GPTQConfig(bits=2), still))
        assert torch.equal(plain.fc1.weight, same.fc1.weight)
        trained = quantized(trained_digits, GPTQConfig(bits=2, finetune=Finetune(epochs=1)), digits_task)
        full = digits_task.score(trained_digits, "test")
        assert digits_task.score(trained, "test") > full - 0.02


class TestBadInput:
    def test_no_data_is_an_error(self) -> None:
        with pytest.raises(StageError, match="gives no batches"):
            implement(GPTQConfig()).analyze(network(), Inputs())
        with pytest.raises(StageError, match=r"inputs of the layer '0' are NaN"):
            quantized(network(), GPTQConfig(), Inputs(torch.full((4, 80), torch.nan)))

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"order": "random"}, "'data' or 'activation'"),
            ({"damping": 0}, "damping"),
            ({"block": 0}, "block"),
            ({"max_inputs": 0}, "max_inputs"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            GPTQConfig(**options)
