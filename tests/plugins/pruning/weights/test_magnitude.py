"""Pruning by magnitude: what is cut, how many, and that it stays cut."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.technique import TrainingRule
from rarefy.weights import layer_weights
from rarefy_pruning.weights.config import MagnitudeConfig
from rarefy_pruning.weights.criterion import WeightCriterion
from rarefy_pruning.weights.magnitude import Magnitude
from rarefy_pruning.weights.masks import cubic, keep_largest
from torch import nn
from torch.nn.utils import prune as torch_prune

TASK: Any = None  # magnitude needs no data


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def train(model: nn.Module, rule: TrainingRule | None, steps: int = 40, watch: Any = None) -> float:
    """Train with Adam, whose momentum moves weights that get no gradient; return the accuracy."""
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        batch = torch.randint(0, len(images), (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if rule is not None:
            rule.after_step(model, step / steps)
        if watch is not None:
            watch(step, model)
    return float((model(images).argmax(1) == labels).float().mean())


def prune(model: nn.Module, **options: Any) -> nn.Module:
    """Prune without fine-tuning, as the pipeline would."""
    technique = Magnitude(MagnitudeConfig(**options))
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)
    return technique.consolidate(changed)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight.detach() for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in weights(model)])


class TestKeepLargest:
    def test_it_keeps_exactly_so_many_when_all_are_equal(self) -> None:
        masks = keep_largest([torch.ones(3, 4), torch.ones(5)], 7)
        assert sum(int(mask.sum()) for mask in masks) == 7
        again = keep_largest([torch.ones(3, 4), torch.ones(5)], 7)
        assert all(torch.equal(one, other) for one, other in zip(masks, again, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("kept", [2, 3, 17, 49, 50])
    def test_it_keeps_the_largest(self, kept: int, dtype: torch.dtype) -> None:
        torch.manual_seed(kept)
        scores = [torch.rand(5, 6).to(dtype), torch.rand(20).to(dtype)]
        masks = keep_largest(scores, kept)
        chosen = torch.cat([score[mask] for score, mask in zip(scores, masks, strict=True)])
        left = torch.cat([score[~mask] for score, mask in zip(scores, masks, strict=True)])
        assert len(chosen) == kept
        # one of each tensor is kept whatever it scores, so compare the others
        assert kept == 2 or left.numel() == 0 or chosen.sort().values[1] >= left.max()

    def test_no_tensor_is_emptied(self) -> None:
        masks = keep_largest([torch.tensor([1e-9, 3e-9, 2e-9]), torch.arange(1.0, 10)], 4)
        assert masks[0].tolist() == [False, True, False]
        assert masks[1].tolist() == [False] * 6 + [True] * 3


class TestOneShot:
    @pytest.mark.parametrize("amount", [0.001, 0.3, 0.5, 0.8, 0.9])
    def test_the_global_count_is_exact_and_the_smallest_go(self, amount: float) -> None:
        model = network()
        before, after = flat(model), flat(prune(model, amount=amount))
        assert int((after == 0).sum()) == round(amount * before.numel())
        gone = before[after == 0].abs().max()
        # the last weight of a layer stays, however small
        assert int((before[after != 0].abs() < gone).sum()) <= len(list(model.modules()))
        assert torch.equal(after[after != 0], before[after != 0])

    def test_the_count_is_exact_in_each_layer(self) -> None:
        pruned = prune(network(), amount=0.7, scope="layer")
        assert [int((w == 0).sum()) for w in weights(pruned)] == [round(0.7 * n) for n in (2048, 512, 160)]

    @pytest.mark.parametrize("scope", ["global", "layer"])
    def test_equal_magnitudes_are_not_over_pruned(self, scope: str) -> None:
        model = network()
        for weight in weights(model):
            weight.copy_(torch.where(weight > 0, 0.5, -0.5))
        assert int((flat(prune(model, amount=0.25, scope=scope)) == 0).sum()) == 2720 // 4

    def test_biases_and_the_original_stay(self) -> None:
        model = network()
        before = copy.deepcopy(model.state_dict())
        pruned = prune(model, amount=0.9)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(torch.equal(before[f"{i}.bias"], pruned.state_dict()[f"{i}.bias"]) for i in (0, 2, 4))

    def test_per_layer_amounts_go_before_the_common_one(self) -> None:
        pruned = prune(network(), amount=0.5, per_layer={"0": 0.9, "[0-2]": 0.25})
        assert [round(float((w == 0).float().mean()), 3) for w in weights(pruned)] == [0.9, 0.25, 0.5]

    def test_without_amount_only_named_layers_are_pruned(self) -> None:
        model = network()
        analysis = Magnitude(MagnitudeConfig(per_layer={"2": 0.5})).analyze(model, TASK)
        assert [layer.name for layer in analysis.layers] == ["2"]
        assert {layer.name for layer in analysis.skipped} == {"0", "4"}
        assert all("per_layer" in layer.reason for layer in analysis.skipped)

    def test_a_layer_keeps_its_largest_weight(self) -> None:
        model = network()
        weights(model)[1].mul_(1e-6)
        largest = weights(model)[1].abs().max()
        small = weights(prune(model, amount=0.9))[1]
        assert small.count_nonzero() == 1
        assert small.abs().max() == largest
        assert weights(prune(nn.Sequential(nn.Linear(2, 2)), amount=0.99, scope="layer"))[0].count_nonzero() == 1

    def test_convolutions_are_pruned(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        assert int((flat(prune(model, amount=0.5)) == 0).sum()) == (8 * 27 + 32) // 2

    def test_pruning_twice_is_pruning_once(self) -> None:
        once = prune(network(), amount=0.8)
        assert torch.equal(flat(prune(once, amount=0.8)), flat(once))

    def test_tied_weights_count_once_and_stay_tied(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        analysis = Magnitude(MagnitudeConfig(amount=0.5)).analyze(model, TASK)
        assert [(layer.name, "'0'" in layer.reason) for layer in analysis.skipped] == [("2", True)]
        pruned = prune(model, amount=0.5)
        assert pruned[2].weight is pruned[0].weight
        assert int((pruned[0].weight == 0).sum()) == 32


class TestAnalysis:
    def test_it_reports_what_comes_out(self) -> None:
        model = network()
        before = copy.deepcopy(model.state_dict())
        analysis = Magnitude(MagnitudeConfig(amount=0.8)).analyze(model, TASK)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        pruned = weights(prune(model, amount=0.8))
        for layer, weight in zip(analysis.layers, pruned, strict=True):
            assert layer.scores["parameters_after"] == weight.count_nonzero()
            assert layer.scores["sparsity"] == pytest.approx(float((weight == 0).double().mean()))

    def test_a_layer_that_is_sparser_already_is_left_alone(self) -> None:
        model = network()
        weights(model)[0][:30] = 0
        analysis = Magnitude(MagnitudeConfig(amount=0.5, scope="layer")).analyze(model, TASK)
        assert [layer.name for layer in analysis.layers] == ["2", "4"]
        assert "93.8% of its weights are zero" in analysis.skipped[0].reason
        assert torch.equal(weights(prune(model, amount=0.5, scope="layer"))[0], weights(model)[0])

    def test_a_layer_above_the_common_threshold_is_told(self) -> None:
        model = network()
        weights(model)[2].copy_(torch.full((10, 16), 9.0))
        analysis = Magnitude(MagnitudeConfig(amount=0.5)).analyze(model, TASK)
        assert [(layer.name, "none of its weights" in layer.reason) for layer in analysis.skipped] == [("4", True)]


class TestFineTuning:
    def test_masks_survive_momentum(self) -> None:
        model = network()
        train(model, None, steps=100)
        technique = Magnitude(MagnitudeConfig(amount=0.8))
        pruned = technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)
        before = flat(pruned) == 0
        accuracy = train(pruned, technique.training_rule(pruned), steps=60)
        after = flat(technique.consolidate(pruned))
        assert torch.equal(after == 0, before)
        assert not torch.equal(after, flat(prune(model, amount=0.8)))
        assert accuracy > 0.9

    def test_without_the_rule_momentum_would_fill_them(self) -> None:
        pruned = prune(network(), amount=0.8)
        train(pruned, None, steps=3)
        assert int((flat(pruned) == 0).sum()) < 0.5 * flat(pruned).numel()

    def test_a_gradual_schedule_follows_the_cubic_and_never_regrows(self) -> None:
        model = network()
        config = MagnitudeConfig(amount=0.9, schedule="cubic", ramp=0.5, updates=10, finetune={"epochs": 1})
        technique = Magnitude(config)
        pruned = technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)
        assert torch.equal(flat(pruned), flat(model))
        seen: list[torch.Tensor] = []
        accuracy = train(pruned, technique.training_rule(pruned), 200, lambda _, m: seen.append(flat(m) == 0))
        zeros = [int(mask.sum()) for mask in seen]
        expected = [round(2720 * cubic(0, 0.9, min(step // 10, 10) / 10)) for step in range(1, 201)]
        assert zeros == expected
        assert all(bool((later | ~earlier).all()) for earlier, later in pairwise(seen))
        assert torch.equal(flat(technique.consolidate(pruned)) == 0, seen[-1])
        assert accuracy > 0.85

    def test_a_schedule_cut_short_still_leaves_the_amount_asked_for(self) -> None:
        config = MagnitudeConfig(amount=0.75, schedule="cubic", finetune={"epochs": 1})
        technique, model = Magnitude(config), network()
        rule = technique.training_rule(model)
        rule.after_step(model, 0.1)
        assert 0 < int((flat(model) == 0).sum()) < 0.5 * 2720
        assert int((flat(technique.consolidate(model)) == 0).sum()) == round(0.75 * 2720)

    def test_a_schedule_starts_from_the_zeros_there_are(self) -> None:
        config = MagnitudeConfig(amount=0.8, schedule="cubic", updates=4, ramp=1.0, finetune={"epochs": 1})
        technique, model = Magnitude(config), prune(network(), amount=0.5)
        before = flat(model) == 0
        rule = technique.training_rule(model)
        rule.after_step(model, 0.25)
        assert int((flat(model) == 0).sum()) == round(2720 * cubic(0.5, 0.8, 0.25))
        assert bool((flat(model) == 0)[before].all())

    def test_the_same_training_gives_the_same_weights(self) -> None:
        results = []
        for _ in range(2):
            technique = Magnitude(MagnitudeConfig(amount=0.9, schedule="cubic", finetune={"epochs": 1}))
            model = network()
            train(model, technique.training_rule(model), steps=20)
            results.append(flat(technique.consolidate(model)))
        assert torch.equal(*results)


def test_the_cubic_ramp_has_its_published_values() -> None:
    # s_t = s_f + (s_i - s_f)(1 - t)^3, Zhu & Gupta 2017, eq. 1
    assert cubic(0.0, 0.8, 0.0) == 0.0
    assert cubic(0.0, 0.8, 0.5) == pytest.approx(0.7)
    assert cubic(0.2, 0.6, 0.5) == pytest.approx(0.55)
    assert cubic(0.2, 0.6, 1.0) == 0.6


def test_another_criterion_is_a_few_lines() -> None:
    class Relative(WeightCriterion[MagnitudeConfig]):
        """Magnitude as a share of the layer's largest."""

        def score(self, weight: torch.Tensor) -> torch.Tensor:
            return weight.abs() / weight.abs().max()

    model = network()
    weights(model)[0].mul_(1e-3)
    technique = Relative(MagnitudeConfig(amount=0.5))
    pruned = technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)
    assert int((flat(pruned) == 0).sum()) == 1360
    assert weights(pruned)[0].count_nonzero() > 500
    assert weights(prune(model, amount=0.5))[0].count_nonzero() < weights(pruned)[0].count_nonzero()


def test_zeros_go_first_whatever_a_criterion_says() -> None:
    class Smallest(WeightCriterion[MagnitudeConfig]):
        """The contrary of magnitude."""

        def score(self, weight: torch.Tensor) -> torch.Tensor:
            return -weight.abs()

    model = prune(network(), amount=0.3)
    pruned = Smallest(MagnitudeConfig(amount=0.5)).consolidate(copy.deepcopy(model))
    assert int((flat(pruned) == 0).sum()) == 1360
    assert bool((flat(pruned) == 0)[flat(model) == 0].all())


def test_a_gradual_plan_says_that_it_is_a_forecast() -> None:
    config = MagnitudeConfig(amount=0.5, schedule="cubic", finetune={"epochs": 1})
    gradual, at_once = (Magnitude(c).analyze(network(), TASK) for c in (config, MagnitudeConfig(amount=0.5)))
    assert all(layer.action.startswith("keep about ") for layer in gradual.layers)
    assert not any("about" in layer.action for layer in at_once.layers)


class TestBadInput:
    @pytest.mark.parametrize("amount", [0, 1, -0.1, 1.5, float("nan")])
    def test_amounts_outside_are_refused(self, amount: float) -> None:
        with pytest.raises(ValidationError, match="amount"):
            MagnitudeConfig(amount=amount)
        with pytest.raises(ValidationError, match="per_layer"):
            MagnitudeConfig(per_layer={"0": amount})

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({}, "give `amount`"),
            ({"amount": 0.5, "schedule": "cubic"}, "give `finetune`"),
            ({"amount": 0.5, "schedule": "cubic", "finetune": {"epochs": 0}}, "give `finetune`"),
            ({"amount": 0.5, "schedule": "cubic", "finetune": {"keep": "best"}}, "keep: last"),
            ({"amount": 0.5, "schedule": "cubic", "finetune": {"patience": 2}}, "patience"),
            ({"amount": 0.5, "ramp": 0.5}, "belong to `schedule: cubic`"),
            ({"amount": 0.5, "scope": "locally"}, "'global', 'layer' or 'row'"),
            ({"amount": 0.5, "share": 0.5}, "share"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            MagnitudeConfig(**options)

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        technique = Magnitude(MagnitudeConfig(amount=0.5, per_layer={"0": 0.3, "conv*": 0.2}))
        with pytest.raises(StageError, match=r"'conv\*'.*target layers are 0, 2, 4"):
            technique.analyze(network(), TASK)

    def test_a_pattern_behind_another_is_refused(self) -> None:
        technique = Magnitude(MagnitudeConfig(per_layer={"*": 0.3, "2": 0.2}))
        with pytest.raises(StageError, match=r"'2'.*earlier pattern"):
            technique.analyze(network(), TASK)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, value: float) -> None:
        model = network()
        weights(model)[1][0, 0] = value
        with pytest.raises(StageError, match=r"'2'.*NaN or infinite"):
            Magnitude(MagnitudeConfig(amount=0.5)).analyze(model, TASK)

    def test_layers_without_weights_are_told(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(4, 0)
        dead = nn.Linear(4, 4)
        nn.init.zeros_(dead.weight)
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        masked = nn.Linear(4, 4)
        torch_prune.identity(masked, "weight")
        model = nn.ModuleDict(
            {"empty": empty, "dead": dead, "normed": normed, "masked": masked, "good": nn.Linear(4, 4)}
        )
        analysis = Magnitude(MagnitudeConfig(amount=0.5)).analyze(model, TASK)
        assert [layer.name for layer in analysis.layers] == ["good"]
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert "no weights" in reasons["empty"]
        assert "zero" in reasons["dead"]
        assert "computed from other tensors" in reasons["masked"]


def test_a_layer_in_two_places_is_one_target() -> None:
    shared = nn.Linear(4, 4)
    found, _ = layer_weights(nn.Sequential(shared, nn.ReLU(), shared), MagnitudeConfig(amount=0.5))
    assert [weight.name for weight in found] == ["0"]
