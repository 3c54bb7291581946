"""SparseGPT and layer-wise Optimal Brain Surgeon on trained networks: what they keep, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.testing.subjects import Inputs
from rarefy_pruning.second_order.config import OBSConfig, SparseGPTConfig
from rarefy_pruning.weights.config import MagnitudeConfig
from torch import nn

BOTH = pytest.mark.parametrize("kind", [SparseGPTConfig, OBSConfig])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4))


def data(features: int = 12) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=generator)
    return Inputs(*(torch.randn(40, features, generator=generator) @ mix for _ in range(3)))


def prune(config: Any, model: nn.Module, task: Any) -> nn.Module:
    technique = implement(config)
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    return technique.consolidate(changed)


def sparsities(model: nn.Module) -> list[int]:
    return [int((p == 0).sum()) for p in model.parameters() if p.dim() > 1]


class TestAgainstMagnitude:
    @pytest.mark.parametrize(("kind", "amount", "drop"), [(SparseGPTConfig, 0.6, 0.03), (OBSConfig, 0.75, 0.02)])
    def test_without_retraining_it_is_better_at_the_same_density(
        self, kind: Any, amount: float, drop: float, digits_task: Any, trained_digits: nn.Module
    ) -> None:
        targets = {"exclude": ("fc1",)} if kind is OBSConfig else {}  # its 512 inputs take seconds
        ours = prune(kind(amount=amount, targets=targets), trained_digits, digits_task)
        theirs = prune(MagnitudeConfig(amount=amount, scope="layer", targets=targets), trained_digits, digits_task)
        assert sparsities(ours) == sparsities(theirs)
        x = next(iter(digits_task.loader("validation", 180)))[0]
        with torch.no_grad():
            errors = [(m(x) - trained_digits(x)).square().mean() for m in (ours, theirs)]
        assert errors[0] < 0.5 * errors[1]
        full, best, other = (digits_task.score(m, "test") for m in (trained_digits, ours, theirs))
        assert best > full - drop
        assert best > other + 0.05

    def test_exact_removal_is_better_than_one_pass(self) -> None:
        model, task = network(), data()
        x = torch.cat(task.batches)
        errors = []
        for kind in (OBSConfig, SparseGPTConfig):
            pruned = prune(kind(amount=0.5, targets={"include": ("0",)}), model, task)
            errors.append(float((pruned[0](x) - model[0](x)).detach().square().sum()))
        assert errors[0] < errors[1]


class TestCounts:
    @BOTH
    def test_each_layer_gets_its_share_exactly(self, kind: Any) -> None:
        pruned = prune(kind(amount=0.5, per_layer={"2": 0.3}), network(), data())
        assert sparsities(pruned) == [96, 48, 20]

    @BOTH
    def test_a_layer_keeps_a_weight(self, kind: Any) -> None:
        assert sparsities(prune(kind(amount=0.999), nn.Sequential(nn.Linear(12, 1)), data())) == [11]

    @BOTH
    def test_the_report_is_what_comes_out(self, kind: Any) -> None:
        model, task = network(), data()
        analysis = implement(kind(amount=0.4)).analyze(model, task)
        kept = [layer.scores["parameters_after"] for layer in analysis.layers]
        pruned = prune(kind(amount=0.4), model, task)
        assert kept == [int(p.count_nonzero()) for p in pruned.parameters() if p.dim() > 1]

    @BOTH
    def test_zeros_stay_and_count(self, kind: Any) -> None:
        model = network()
        with torch.no_grad():
            model[0].weight[:, :3] = 0
            model[2].weight[:8] = 0
        analysis = implement(kind(amount=0.5)).analyze(model, data())
        assert [(s.name, "128 of its 160 weights are zero already" in s.reason) for s in analysis.skipped] == [
            ("2", True)
        ]
        pruned = prune(kind(amount=0.5), model, data())
        assert sparsities(pruned) == [96, 128, 20]
        assert not pruned[0].weight[:, :3].any()
        assert torch.equal(pruned[2].weight, model[2].weight)

    @BOTH
    def test_inputs_that_are_always_zero_lose_their_weights_first(self, kind: Any) -> None:
        task = Inputs(*(x.clone() for x in data().batches))
        for x in task.batches:
            x[:, [1, 7]] = 0
        pruned = prune(kind(amount=2 / 12), nn.Sequential(nn.Linear(12, 5)), task)
        assert not pruned[0].weight[:, [1, 7]].any()
        assert sparsities(pruned) == [10]

    @BOTH
    def test_biases_and_the_original_stay(self, kind: Any) -> None:
        model = network()
        before = copy.deepcopy(model.state_dict())
        pruned = prune(kind(amount=0.5), model, data())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(pruned[0].bias, model[0].bias)

    @BOTH
    def test_half_precision(self, kind: Any) -> None:
        task = Inputs(*(x.bfloat16() for x in data().batches))
        pruned = prune(kind(amount=0.5), network().bfloat16(), task)
        assert sparsities(pruned) == [96, 80, 20]
        assert pruned[0].weight.dtype == torch.bfloat16

    @BOTH
    def test_groups_and_channels_last(self, kind: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        inputs = Inputs(torch.randn(16, 4, 8, 8))
        plain = prune(kind(amount=0.5), model, inputs)
        last = prune(kind(amount=0.5), model.to(memory_format=torch.channels_last), inputs)
        assert sparsities(plain) == sparsities(last) == [72, 36]
        torch.testing.assert_close(plain[0].weight, last[0].weight.contiguous())


class TestPattern:
    @pytest.mark.parametrize(("pattern", "zeros"), [("2:4", [96, 80, 16]), ("1:3", [128, 100, 24])])
    def test_at_most_n_of_m_stay(self, pattern: str, zeros: list[int]) -> None:
        pruned = prune(SparseGPTConfig(pattern=pattern), network(), data())
        keep, of = map(int, pattern.split(":"))
        assert sparsities(pruned) == zeros
        assert (pruned[0].weight.view(16, -1, of).count_nonzero(-1) == keep).all()

    def test_in_a_convolution_it_lies_along_the_channels(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 6, (3, 2)))
        pruned = prune(SparseGPTConfig(pattern="2:4"), model, Inputs(torch.randn(9, 8, 6, 6)))
        assert (pruned[0].weight.unflatten(1, (2, 4)).count_nonzero(2) == 2).all()


class TestCalibration:
    @BOTH
    def test_a_layer_is_calibrated_behind_those_already_pruned(self, kind: Any) -> None:
        model, task = network(), data()
        sequential = prune(kind(amount=0.5), model, task)
        first = prune(kind(amount=0.5, targets={"include": ("0",)}), model, task)
        second = prune(kind(amount=0.5, targets={"include": ("2",)}), first, task)
        assert torch.equal(sequential[2].weight, second[2].weight)

    @BOTH
    def test_or_on_the_model_as_it_was(self, kind: Any) -> None:
        model, task = network(), data()
        parallel = prune(kind(amount=0.5, sequential=False), model, task)
        alone = prune(kind(amount=0.5, targets={"include": ("2",)}), model, task)
        assert torch.equal(parallel[2].weight, alone[2].weight)

    def test_the_order_is_that_of_the_data(self) -> None:
        class Reversed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.last, self.spare, self.first = nn.Linear(8, 4), nn.Linear(5, 5), nn.Linear(12, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.last(self.first(x))

        analysis = implement(SparseGPTConfig(amount=0.5)).analyze(Reversed(), data())
        assert [layer.name for layer in analysis.layers] == ["first", "last"]
        assert [(s.name, "never reaches" in s.reason) for s in analysis.skipped] == [("spare", True)]

    @BOTH
    def test_a_tied_weight_is_calibrated_on_the_inputs_of_all_its_layers(self, kind: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        model[2].weight = model[0].weight
        analysis = implement(kind(amount=0.5)).analyze(model, data())
        assert [s.name for s in analysis.skipped] == ["2"]
        technique, task = implement(kind(amount=0.5)), data()
        calibration = technique.calibration(task)
        assert calibration.hessian(calibration.passes(model), "0").seen == 2 * 120
        pruned = prune(kind(amount=0.5), model, task)
        assert pruned[2].weight is pruned[0].weight

    def test_a_weight_that_an_embedding_shares_is_left_alone(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9), nn.Linear(9, 3))
        model[1].weight = model[0].weight
        task = Inputs(torch.randint(0, 9, (20, 4)))
        analysis = implement(SparseGPTConfig(amount=0.5)).analyze(model, task)
        assert [(s.name, "shares its weight with '0'" in s.reason) for s in analysis.skipped] == [("1", True)]

    def test_a_note_names_the_layer_that_suffers_most(self) -> None:
        technique, model, task = implement(SparseGPTConfig(amount=0.5)), network(), data()
        technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
        assert any("relative output error" in note for note in technique.notes)


class TestBadInput:
    @BOTH
    def test_layers_that_are_too_wide_are_left_alone_and_the_limit_named(self, kind: Any) -> None:
        analysis = implement(kind(amount=0.5, max_inputs=12)).analyze(network(), data())
        assert [layer.name for layer in analysis.layers] == ["0", "4"]
        assert "16 x 16 and `max_inputs` is 12" in analysis.skipped[0].reason

    @BOTH
    def test_without_amount_only_named_layers_are_pruned(self, kind: Any) -> None:
        analysis = implement(kind(per_layer={"2": 0.5})).analyze(network(), data())
        assert [layer.name for layer in analysis.layers] == ["2"]
        assert all("per_layer" in s.reason for s in analysis.skipped)

    @BOTH
    def test_data_that_is_not_finite_is_an_error(self, kind: Any) -> None:
        with pytest.raises(StageError, match=r"inputs of the layer '0' are NaN"):
            prune(kind(amount=0.5), network(), Inputs(torch.full((4, 12), torch.nan)))

    @BOTH
    def test_no_batches_and_no_matching_layers_are_errors(self, kind: Any) -> None:
        with pytest.raises(StageError, match="gives no batches"):
            implement(kind(amount=0.5)).analyze(network(), Inputs())
        with pytest.raises(StageError, match="no layer matches"):
            implement(kind(amount=0.5, targets={"include": ("x",)})).analyze(network(), data())
        with pytest.raises(StageError, match="'x'"):
            implement(kind(amount=0.5, per_layer={"x": 0.5})).analyze(network(), data())

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({}, "give `amount`"),
            ({"amount": 0.5, "pattern": "2:4"}, "leave out `amount`"),
            ({"per_layer": {"0": 0.5}, "pattern": "2:4"}, "leave out `amount`"),
            ({"pattern": "4:4"}, "removes nothing"),
            ({"pattern": "2-4"}, "pattern"),
            ({"pattern": "0:4"}, "pattern"),
            ({"amount": 0.5, "block": 0}, "block"),
            ({"amount": 0.5, "damping": 0}, "damping"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            SparseGPTConfig(**options)

    def test_the_surgeon_needs_an_amount(self) -> None:
        with pytest.raises(ValidationError, match="give `amount`"):
            OBSConfig()
