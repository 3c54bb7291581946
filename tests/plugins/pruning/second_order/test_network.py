"""Optimal Brain Surgeon on whole small networks, against numpy and on the classic XOR."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.testing.subjects import Inputs
from rarefy_pruning.second_order.config import NetworkOBSConfig
from rarefy_pruning.second_order.network import NetworkOBS, gradients, recursive_inverse
from rarefy_pruning.weights.config import MagnitudeConfig
from rarefy_pruning.weights.magnitude import Magnitude
from torch import nn

INPUTS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
XOR = torch.tensor([[-1.0], [1.0], [1.0], [-1.0]])


def prune(technique: Any, model: nn.Module, task: Any) -> nn.Module:
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    return technique.consolidate(changed)


def surgeon(model: nn.Module, task: Any, **options: Any) -> nn.Module:
    return prune(NetworkOBS(NetworkOBSConfig(**options)), model, task)


def trained_xor() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        (model(INPUTS) - XOR).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.requires_grad_(False)


class TestInverse:
    @pytest.mark.parametrize("at_once", [1, 3, 64])
    def test_the_recursion_over_samples_equals_numpys_inverse(self, at_once: int) -> None:
        x = np.random.default_rng(0).normal(size=(20, 6))
        expected = np.linalg.inv(1e-4 * np.eye(6) + x.T @ x / 20)
        found = recursive_inverse(torch.from_numpy(x), 1e-4, at_once).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-8)

    def test_fewer_samples_than_weights_leave_it_the_damping(self) -> None:
        x = np.random.default_rng(0).normal(size=(3, 8))
        found = recursive_inverse(torch.from_numpy(x), 0.01).numpy()
        np.testing.assert_allclose(found, np.linalg.inv(0.01 * np.eye(8) + x.T @ x / 3), rtol=1e-9, atol=1e-9)


class TestGradients:
    def test_those_of_a_linear_layer_are_its_inputs(self) -> None:
        x = torch.randn(5, 3)
        layer = nn.Sequential(nn.Linear(3, 2))
        found = gradients(layer, ["0.weight", "0.bias"], [(x,)]).view(5, 2, 8)
        for sample in range(5):
            for unit in range(2):
                expected = torch.zeros(2, 3)
                expected[unit] = x[sample]
                assert torch.equal(found[sample, unit, :6].view(2, 3).float(), expected)
                assert found[sample, unit, 6:].tolist() == [float(unit == 0), float(unit == 1)]

    def test_they_predict_a_small_change_of_the_outputs(self) -> None:
        model, names = trained_xor(), ["0.weight", "0.bias", "2.weight", "2.bias"]
        model.double()
        before = model(INPUTS.double()).flatten()
        step = 1e-6 * torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        predicted = gradients(model, names, [(INPUTS.double(),)]) @ step
        for name, part in zip(names, step.split([6, 3, 3, 1]), strict=True):
            parameter = model.get_parameter(name)
            parameter.add_(part.view_as(parameter))
        torch.testing.assert_close(model(INPUTS.double()).flatten() - before, predicted, rtol=1e-3, atol=1e-10)

    def test_the_model_is_left_alone(self) -> None:
        model = trained_xor().train()
        gradients(model, ["0.weight"], [(INPUTS,)])
        assert model.training
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())


class TestSurgery:
    def test_it_is_the_constrained_optimum_of_the_quadratic_error(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(5, 2)).double(), torch.randn(30, 5, dtype=torch.float64)
        pruned = surgeon(model, Inputs(x), amount=0.4, damping=1e-6)[0]
        # the outputs are linear in the weights, so that the error is theirs exactly: a least-squares fit per output
        full = np.column_stack([x.numpy(), np.ones(30)])
        outputs = model(x).detach().numpy()
        for row in range(2):
            kept = [*np.flatnonzero(pruned.weight[row].detach().numpy()), 5]
            fit = np.linalg.lstsq(full[:, kept], outputs[:, row], rcond=None)[0]
            found = np.append(pruned.weight[row].detach().numpy(), pruned.bias[row].item())[kept]
            np.testing.assert_allclose(found, fit, rtol=1e-4, atol=1e-5)
        assert int((pruned.weight == 0).sum()) == 4

    def test_it_prunes_xor_without_a_trace_where_magnitude_breaks_it(self) -> None:
        model, task = trained_xor(), Inputs(INPUTS)
        assert (model(INPUTS) - XOR).abs().max() < 0.1
        ours = surgeon(model, task, amount=3 / 9, damping=1e-4)
        theirs = prune(Magnitude(MagnitudeConfig(amount=3 / 9)), model, task)
        for pruned in (ours, theirs):
            assert int((pruned[0].weight == 0).sum() + (pruned[2].weight == 0).sum()) == 3
        assert (ours(INPUTS) - XOR).abs().max() < 0.2
        assert (theirs(INPUTS) - XOR).abs().max() > 1

    def test_weights_that_went_in_one_round_stay_zero_in_the_next(self) -> None:
        model, task = trained_xor(), Inputs(INPUTS)
        once, twice = (surgeon(model, task, amount=a, rounds=r, damping=1e-4) for a, r in ((2 / 9, 1), (4 / 9, 2)))
        for place in (0, 2):
            assert not twice[place].weight[once[place].weight == 0].any()
        assert sum(int((twice[place].weight == 0).sum()) for place in (0, 2)) == 4

    def test_it_beats_magnitude_without_retraining(self, digits_task: Any) -> None:
        from rarefy.training import fit
        from rarefy_schemas import Finetune

        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        fit(model, model, digits_task, Finetune(epochs=15, lr=5e-3))
        ours = surgeon(model, digits_task, amount=0.6, batches=4)
        theirs = prune(Magnitude(MagnitudeConfig(amount=0.6)), model, digits_task)
        full, best, other = (digits_task.score(m, "test") for m in (model, ours, theirs))
        assert best > full - 0.04
        assert best > other + 0.02

    def test_every_layer_keeps_a_weight_and_biases_stay(self) -> None:
        pruned = surgeon(trained_xor(), Inputs(INPUTS), amount=0.95)
        assert [int(pruned[place].weight.count_nonzero()) for place in (0, 2)] == [1, 1]
        assert pruned[0].bias.count_nonzero() == 3


class TestBadInput:
    def test_a_large_network_is_refused_with_the_limit(self) -> None:
        technique = NetworkOBS(NetworkOBSConfig(amount=0.5, max_weights=12))
        with pytest.raises(StageError, match=r"13 weights and biases.*169 entries.*`max_weights` is 12.*pruning/obs"):
            technique.analyze(trained_xor(), Inputs(INPUTS))

    def test_a_layer_without_effect_is_named(self) -> None:
        model = trained_xor()
        model.add_module("spare", nn.Sequential())
        model.spare.register_module("unused", nn.Linear(3, 3))
        model.spare.forward = lambda x: x  # type: ignore[method-assign]
        analysis = NetworkOBS(NetworkOBSConfig(amount=0.3)).analyze(model, Inputs(INPUTS))
        assert [(s.name, "do not change" in s.reason) for s in analysis.skipped] == [("spare.unused", True)]
        assert [layer.name for layer in analysis.layers] == ["0", "2"]

    def test_nothing_to_do_is_told(self) -> None:
        pruned = surgeon(trained_xor(), Inputs(INPUTS), amount=0.5)
        analysis = NetworkOBS(NetworkOBSConfig(amount=0.3)).analyze(pruned, Inputs(INPUTS))
        assert not analysis.layers
        assert all("zero already" in s.reason for s in analysis.skipped)

    def test_outputs_that_are_not_finite_are_an_error(self) -> None:
        with pytest.raises(StageError, match="NaN or infinite"):
            surgeon(trained_xor(), Inputs(INPUTS * torch.nan), amount=0.5)

    def test_no_batches_are_an_error(self) -> None:
        with pytest.raises(StageError, match="no batches"):
            surgeon(trained_xor(), Inputs(), amount=0.5)

    @pytest.mark.parametrize("options", [{}, {"amount": 1}, {"amount": 0.5, "damping": 0}])
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            NetworkOBSConfig(**options)
