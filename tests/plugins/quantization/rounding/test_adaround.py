"""AdaRound against enumeration on small problems, its pieces by hand, and on networks against plain rounding."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.hessian import PairedHessian
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.testing.subjects import Inputs
from rarefy.training import fit
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.grids import Grid, Units
from rarefy_quantization.rounding.adaround import Problem, gate, indecision, learn, neighbours, settle, ungate
from rarefy_quantization.rounding.config import AdaRoundConfig
from rarefy_schemas import Finetune
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(rows: int, inputs: int, seed: int) -> tuple[Problem, torch.Tensor]:
    """Return a problem with correlated inputs, and the weights it is about."""
    x = normal(4 * inputs, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1)
    h = (x.T @ x / len(x))[None]
    weight = 0.7 * normal(1, rows, inputs, seed=seed + 2)
    grid = Grid(*(torch.tensor(value, dtype=torch.float64) for value in (0.5, -4.0, 3.0)))
    return Problem(*neighbours(weight, grid), h, weight @ h), weight


def start(found: Problem, weight: torch.Tensor) -> torch.Tensor:
    return ((weight - found.down) / (found.up - found.down)).nan_to_num(0).clamp(0, 1)


def choice(found: Problem, raised: torch.Tensor) -> torch.Tensor:
    return torch.where(raised, found.up, found.down)


def quantized(model: nn.Module, config: Any, task: Any) -> nn.Module:
    technique = implement(config)
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    if config.finetune is not None:
        fit(changed, model, task, config.finetune, rules=rules_for(technique, changed))
    return technique.consolidate(changed).eval()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4))


def data() -> Inputs:
    """Neighbours are alike."""
    return Inputs(*(normal(100, 40, seed=seed).float().cumsum(-1) for seed in (1, 2, 3)))


def output_error(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).square().mean())


class TestPieces:
    def test_the_gate_is_a_sigmoid_stretched_to_minus_a_tenth_and_eleven_tenths_and_clipped(self) -> None:
        values = torch.tensor([-9.0, -2.5, 0.0, 1.0, 2.5, 9.0])
        by_hand = [0.0, 0.0, 0.5, 1.2 / (1 + 2.718281828459045**-1) - 0.1, 1.0, 1.0]
        assert gate(values).tolist() == pytest.approx(by_hand)
        shares = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
        torch.testing.assert_close(gate(ungate(shares)), shares)

    def test_the_regulariser_is_zero_for_decisions_and_one_half_way(self) -> None:
        assert indecision(torch.tensor([0.0, 0.5, 1.0, 0.75]), 3.0).tolist() == [0.0, 1.0, 0.0, 1 - 0.5**3]

    def test_neighbours_enclose_a_weight_and_meet_where_it_is_zero_or_clipped(self) -> None:
        grid = Grid(*(torch.tensor(value) for value in (0.5, -2.0, 1.0)))
        down, up = neighbours(torch.tensor([0.2, -0.2, 0.0, 0.5, 3.0, -3.0]), grid)
        assert down.tolist() == [0.0, -0.5, 0.0, 0.5, 0.5, -1.0]
        assert up.tolist() == [0.5, 0.0, 0.0, 0.5, 0.5, -1.0]

    def test_the_error_of_a_choice_is_that_of_the_outputs(self) -> None:
        layer, x0, x, rows = nn.Linear(5, 3).double(), normal(50, 5), normal(50, 5, seed=1), normal(1, 3, 5, seed=2)
        hessian = PairedHessian(layer, dtype=torch.float64)
        hessian.update_pair(x0[:20], x[:20])
        hessian.update_pair(x0[20:], x[20:])
        weight = layer.weight.detach()
        found = Problem(rows, rows, hessian.value, weight[None] @ hessian.cross)
        direct = (x @ rows[0].T - x0 @ weight.T).square().sum(1).mean()
        none = (x0 @ weight.T).square().sum(1).mean()
        assert float(found.error(rows)) == pytest.approx(float(direct - none))


class TestDecisions:
    def test_over_many_problems_they_are_near_the_best_of_all_choices(self) -> None:
        totals = torch.zeros(3, dtype=torch.float64)
        choices = torch.tensor(list(itertools.product([False, True], repeat=6)))
        for seed in range(0, 60, 3):
            found, weight = problem(1, 6, seed)
            offset = 0.5 * weight @ found.hessian @ weight.mT
            best = min(float(found.error(choice(found, c[None, None]))) for c in choices)
            learned = settle(found, learn(found, start(found, weight), AdaRoundConfig(iterations=200, lr=0.1)))
            nearest = start(found, weight) > 0.5
            values = [best, float(found.error(choice(found, learned))), float(found.error(choice(found, nearest)))]
            totals += torch.tensor(values, dtype=torch.float64) + offset.item()
        assert totals[0] <= totals[1] <= 1.5 * totals[0]
        assert totals[1] < 0.6 * totals[2]

    def test_without_correlation_they_are_the_nearest(self) -> None:
        found, weight = problem(4, 9, 0)
        diagonal = torch.diag_embed(normal(1, 9, seed=3).square() + 0.1)
        found = Problem(found.down, found.up, diagonal, weight @ diagonal)
        learned = learn(found, start(found, weight), AdaRoundConfig(iterations=300, lr=0.1))
        assert torch.equal(learned, start(found, weight) > 0.5)
        assert torch.equal(settle(found, ~learned), learned)

    def test_learning_alone_lowers_the_error_and_settling_leaves_nothing_to_gain_by_one_reversal(self) -> None:
        found, weight = problem(5, 12, 7)
        nearest = start(found, weight) > 0.5
        learned = learn(found, start(found, weight), AdaRoundConfig(iterations=300, lr=0.1))
        settled = settle(found, learned)
        errors = [float(found.error(choice(found, c))) for c in (settled, learned, nearest)]
        assert errors[0] <= errors[1] < errors[2]
        for row, column in itertools.product(range(5), range(12)):
            reversed_ = settled.clone()
            reversed_[0, row, column] ^= True
            assert float(found.error(choice(found, reversed_))) >= errors[0] - 1e-12


OPTIONS = [
    {"granularity": granularity, "symmetric": symmetric}
    for granularity in ("tensor", "channel", "group")
    for symmetric in (True, False)
]


class TestModels:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_each_weight_becomes_the_value_below_or_above_it(self, options: dict[str, Any]) -> None:
        model, task = network(), data()
        shared = {"bits": 3, "group_size": 32, **options}
        grids = implement(UniformConfig(**shared)).analyze(model, task).plan
        changed = quantized(model, AdaRoundConfig(iterations=50, **shared), task)
        for name, grid in grids.items():
            units = Units.of(model.get_submodule(name).weight.shape, options["granularity"], 32)
            before, after = (units.split(m.get_submodule(name).weight.detach()) for m in (model, changed))
            codes = after / grid.step
            assert torch.equal(codes, codes.round())
            assert ((codes >= grid.low) & (codes <= grid.high)).all()
            assert ((codes - (before / grid.step).maximum(grid.low).minimum(grid.high)).abs() <= 1).all()

    @pytest.mark.parametrize("settle_", [True, False])
    def test_the_error_on_correlated_inputs_is_below_that_of_rounding(self, settle_: bool) -> None:
        model, task, shared = network(), data(), {"bits": 3, "targets": {"include": ("0",)}}
        ours = quantized(model, AdaRoundConfig(settle=settle_, **shared), task)
        plain = quantized(model, UniformConfig(**shared), task)
        x = torch.cat(task.batches)
        assert output_error(ours[0], model[0], x) < 0.2 * output_error(plain[0], model[0], x)

    def test_later_layers_make_up_for_what_earlier_ones_do_to_their_inputs(self) -> None:
        model, task, x = network(), data(), torch.cat(data().batches)
        one, other = (quantized(model, AdaRoundConfig(bits=2, sequential=s), task) for s in (True, False))
        assert output_error(one, model, x) < output_error(other, model, x)

    def test_convolutions_of_all_kinds(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1, groups=2))
        inputs = torch.randn(20, 4, 9, 9, generator=torch.Generator().manual_seed(0)).cumsum(-1)
        ours = quantized(model, AdaRoundConfig(bits=3, iterations=200), Inputs(inputs))
        plain = quantized(model, UniformConfig(bits=3), Inputs(inputs))
        assert output_error(ours, model, inputs) < output_error(plain, model, inputs)

    def test_zeros_dead_inputs_and_bits_per_layer(self) -> None:
        model, task = network(), data()
        with torch.no_grad():
            model[0].weight[model[0].weight.abs() < 0.03] = 0
        for x in task.batches:
            x[:, [1, 7]] = 0
        changed = quantized(model, AdaRoundConfig(bits=2, per_layer={"2": 6}, iterations=50), task)
        assert not changed[0].weight[model[0].weight == 0].any()
        assert max(row.unique().numel() for row in changed[0].weight) <= 4
        assert max(row.unique().numel() for row in changed[2].weight) > 8
        rounded = quantized(model, UniformConfig(bits=2), task)
        torch.testing.assert_close(changed[0].weight[:, [1, 7]], rounded[0].weight[:, [1, 7]])

    def test_the_same_data_gives_the_same_result_also_in_half_precision(self) -> None:
        half = Inputs(*(x.bfloat16() for x in data().batches))
        one, again = (
            quantized(network().bfloat16(), AdaRoundConfig(iterations=20), half).state_dict() for _ in range(2)
        )
        assert all(torch.equal(one[name], again[name]) for name in one)

    def test_digits_at_two_bits(self, digits_task: Any, trained_digits: nn.Module) -> None:
        ours = quantized(trained_digits, AdaRoundConfig(bits=2, iterations=100, lr=0.1), digits_task)
        plain = quantized(trained_digits, UniformConfig(bits=2), digits_task)
        scores = [digits_task.score(model, "test") for model in (trained_digits, ours, plain)]
        assert scores[1] > max(scores[2] + 0.1, scores[0] - 0.03)
        still = AdaRoundConfig(bits=2, iterations=100, lr=0.1, finetune=Finetune(max_steps=1, lr=1e-12))
        assert torch.equal(quantized(trained_digits, still, digits_task).fc1.weight, ours.fc1.weight)


class TestBadInput:
    def test_data_that_is_missing_or_not_finite_is_an_error(self) -> None:
        with pytest.raises(StageError, match="gives no batches"):
            implement(AdaRoundConfig()).analyze(network(), Inputs())
        with pytest.raises(StageError, match=r"inputs of the layer '0' are NaN"):
            quantized(network(), AdaRoundConfig(), Inputs(torch.full((4, 40), torch.nan)))

    @pytest.mark.parametrize("options", [{"iterations": 0}, {"lr": 0}, {"weight": 0}, {"bits": 1}])
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match=next(iter(options))):
            AdaRoundConfig(**options)
