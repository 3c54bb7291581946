"""Layers changed one after the other: their order, what they are calibrated on, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rarefy.hessian import InputHessian, as_rows
from rarefy.layerwise import LayerCalibration, solve_layers_, worst_error
from rarefy.testing.subjects import Inputs
from rarefy.weights import LayerWeight
from torch import nn


class Reversed(nn.Module):
    """Layers in another order than their names, one of them idle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.idle, self.first = nn.Linear(6, 3), nn.Linear(5, 5), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x))
        return out


def data() -> Any:
    return Inputs(*(torch.randn(10, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)))


def weights(model: nn.Module) -> list[LayerWeight]:
    return [LayerWeight(n, m, m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def halve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
    return 0.5 * as_rows(layer)


class TestOrder:
    def test_it_is_that_of_the_data_and_obstacles_are_named(self) -> None:
        model = Reversed()
        order = LayerCalibration(data(), max_inputs=5).order(model, weights(model))
        assert [weight.name for weight, _ in order] == ["first", "last", "idle"]
        assert order[0][1] is None
        assert "6 x 6 and `max_inputs` is 5" in str(order[1][1])
        assert "never reaches it" in str(order[2][1])

    def test_a_weight_that_is_looked_up_elsewhere_is_left_alone(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        model[1].weight = model[0].weight
        ((_, reason),) = LayerCalibration(Inputs(torch.arange(5)), 1).order(model, weights(model))
        assert "shares its weight with '0'" in str(reason)


class TestSolving:
    @pytest.mark.parametrize("sequential", [True, False])
    def test_layers_see_the_changed_model_or_the_old_one(self, sequential: bool) -> None:
        model, task = Reversed(), data()
        seen: dict[str, torch.Tensor] = {}

        def solve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            seen[name] = hessian.value.clone()
            return halve(name, layer, hessian)

        twin = copy.deepcopy(model)
        solve_layers_(model, ["first", "last"], LayerCalibration(task), solve, sequential)
        assert torch.equal(model.first.weight, 0.5 * twin.first.weight)
        assert torch.equal(model.last.weight, 0.5 * twin.last.weight)
        with torch.no_grad():
            x = (model if sequential else twin).first(torch.cat(task.batches))
        torch.testing.assert_close(seen["last"][0], 2 / 30 * x.T @ x)

    def test_a_reference_tells_what_the_inputs_of_a_layer_were(self) -> None:
        model, task = Reversed(), data()
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def solve(name: str, layer: nn.Module, hessian: InputHessian) -> torch.Tensor:
            seen[name] = hessian.value.clone(), hessian.cross.clone()
            return halve(name, layer, hessian)

        twin, x = copy.deepcopy(model), torch.cat(task.batches)
        solve_layers_(model, ["first", "last"], LayerCalibration(task), solve, reference=twin)
        with torch.no_grad():
            before, now = twin.first(x), model.first(x)
        torch.testing.assert_close(seen["last"][0][0], 2 / 30 * now.T @ now)
        torch.testing.assert_close(seen["last"][1][0], 2 / 30 * before.T @ now)
        torch.testing.assert_close(*seen["first"])

    def test_without_a_reference_the_inputs_are_what_they_should_be(self) -> None:
        calibration = LayerCalibration(data())
        hessian = calibration.hessian(calibration.passes(Reversed()), "first")
        assert torch.equal(hessian.cross, hessian.value)

    def test_errors_are_those_of_the_outputs(self) -> None:
        model = Reversed()
        errors = solve_layers_(model, ["first", "last"], LayerCalibration(data()), halve)
        assert errors == pytest.approx({"first": 0.25, "last": 0.25})
        assert worst_error({"a": 0.01, "b": 0.04}) == "largest relative output error of a layer: 20.0%, at 'b'"

    def test_a_shared_weight_is_calibrated_on_the_inputs_of_all_its_layers(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        calibration = LayerCalibration(data(), batches=2, dtype=torch.float64)
        hessian = calibration.hessian(calibration.passes(model, ["0", "2"]), "0")
        assert hessian.seen == 2 * 20
        assert hessian.value.dtype == torch.float64
