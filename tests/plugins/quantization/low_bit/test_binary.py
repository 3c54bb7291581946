"""Binary weights against brute force over signs, the optimizer's own state, and the papers' gradients."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from rarefy.errors import RecipeError
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy.rules import rules_for
from rarefy.training import fit
from rarefy_quantization.grids import Units
from rarefy_quantization.low_bit.config import BinaryConfig
from rarefy_quantization.low_bit.signs import ConnectedSigns, LossAwareSigns, ScaledSigns, glorot
from rarefy_schemas import Finetune
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(weight: torch.Tensor) -> Units:
    return Units.of(weight.shape, "channel", weight.numel())


def best_binary(w: np.ndarray, d: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the scale and signs that minimise sum d (w - scale * sign)^2 over all signs and scales from zero up."""
    found = []
    for pattern in product((-1.0, 1.0), repeat=w.size):
        s = np.array(pattern)
        scale = max(0.0, float((d * w * s).sum() / (d * s * s).sum()))
        found.append((float((d * (w - scale * s) ** 2).sum()), scale, s))
    _, scale, s = min(found, key=lambda one: one[0])
    return scale, s


class TestScaledSigns:
    def test_they_are_the_best_of_all_signs_and_scales(self) -> None:
        weight = normal(4, 8)
        quantized = ScaledSigns(rows(weight))(weight)
        for w, q in zip(weight.double().numpy(), quantized.double().numpy(), strict=True):
            scale, s = best_binary(w, np.ones(8))
            np.testing.assert_allclose(q, scale * s, rtol=2e-5)

    def test_the_gradient_is_that_of_the_quantized_weight(self) -> None:
        weight, upstream = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
        (ScaledSigns(rows(weight))(weight) * upstream).sum().backward()
        torch.testing.assert_close(weight.grad, upstream)

    def test_the_scaled_gradient_is_the_papers(self) -> None:
        weight, upstream = (2 * normal(3, 5)).requires_grad_(), normal(3, 5, seed=1)
        (ScaledSigns(rows(weight), scaled=True)(weight) * upstream).sum().backward()
        w = weight.detach().double().numpy()
        assert 0 < (abs(w) > 1).mean() < 1
        scale = abs(w).mean(1, keepdims=True)
        expected = upstream.double().numpy() * (1 / 5 + scale * (abs(w) <= 1))
        np.testing.assert_allclose(weight.grad.numpy(), expected, rtol=1e-4)


class TestLossAwareSigns:
    def test_they_are_the_best_under_the_curvature(self) -> None:
        weight = normal(4, 8)
        projection = LossAwareSigns(rows(weight), weight)
        projection.observe(normal(4, 8, seed=1))
        projection.observe(3 * normal(4, 8, seed=2))
        quantized = projection(weight).double().numpy()
        d = projection.curvature().double().numpy()
        for w, q, own in zip(weight.double().numpy(), quantized, d, strict=True):
            scale, s = best_binary(w, own)
            np.testing.assert_allclose(q, scale * s, rtol=2e-5)
        assert not np.allclose(abs(quantized[:, 0]), weight.abs().mean(1).numpy(), rtol=0.01)

    def test_without_gradients_they_are_those_of_bwn(self) -> None:
        weight = normal(4, 8)
        one, other = LossAwareSigns(rows(weight), weight)(weight), ScaledSigns(rows(weight))(weight)
        torch.testing.assert_close(one, other, rtol=2e-5, atol=0)

    def test_gradients_of_one_size_change_nothing(self) -> None:
        weight = normal(4, 8)
        projection = LossAwareSigns(rows(weight), weight)
        projection.observe(0.01 * normal(4, 8, seed=1).sign())
        torch.testing.assert_close(projection(weight), ScaledSigns(rows(weight))(weight), rtol=2e-5, atol=0)

    def test_the_curvature_is_adams(self, digits_task: Any, trained_digits: nn.Module, monkeypatch: Any) -> None:
        used: list[torch.optim.Adam] = []
        real = torch.optim.Adam.__init__

        def spy(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> None:
            used.append(self)
            real(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.Adam, "__init__", spy)
        config = BinaryConfig(method="loss-aware", finetune=Finetune(max_steps=7))
        technique = implement(config)
        analysis = technique.analyze(trained_digits, digits_task)
        changed = technique.transform(copy.deepcopy(trained_digits), analysis, digits_task)
        fit(changed, trained_digits, digits_task, config.finetune, rules=rules_for(technique, changed))
        steps = changed.fc1.parametrizations.weight
        state = used[0].state[steps.original]
        assert torch.equal(steps[0].second, state["exp_avg_sq"])
        expected = (state["exp_avg_sq"] / (1 - 0.999**7)).sqrt() + 1e-8
        torch.testing.assert_close(steps[0].curvature(), expected, rtol=1e-3, atol=0)
        latent = steps.original.detach()
        scale = (expected * latent.abs()).sum(1) / expected.sum(1)
        torch.testing.assert_close(changed.fc1.weight.detach()[:, 0].abs(), scale, rtol=1e-4, atol=0)
        assert ((scale - latent.abs().mean(1)).abs() > 1e-3 * scale).any()

    def test_gradients_that_overflow_do_not_count(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3))
        technique = implement(BinaryConfig(method="loss-aware", keep_ends=False, finetune=Finetune()))
        technique.transform(model, technique.analyze(model, None), None)
        (rule,) = rules_for(technique, model)
        steps = model[0].parametrizations.weight
        steps.original.grad = torch.full((3, 3), math.inf)
        rule.before_step(model)
        assert not steps[0].second.any()
        steps.original.grad = torch.ones(3, 3)
        rule.before_step(model)
        assert steps[0].second.all()


class TestConnectedSigns:
    def test_the_sign_of_zero_is_plus(self) -> None:
        assert ConnectedSigns(0.5, False)(torch.tensor([-0.1, 0.0, 0.2])).tolist() == [-0.5, 0.5, 0.5]

    def test_drawn_signs_have_the_right_mean_and_only_in_training(self) -> None:
        weight = torch.tensor([-0.5, -0.3, 0.0, 0.1, 0.45, 0.5])
        projection, count = ConnectedSigns(0.5, True), 4000
        torch.manual_seed(0)
        drawn = torch.stack([projection(weight) for _ in range(count)])
        assert set(drawn.unique().tolist()) == {-0.5, 0.5}
        # the standard deviation of a mean is at most 0.5 / sqrt(4000) = 0.008
        torch.testing.assert_close(drawn.mean(0), weight, atol=4 * 0.5 / math.sqrt(count), rtol=0)
        assert drawn[:, 0].unique().tolist() == [-0.5]
        assert drawn[:, -1].unique().tolist() == [0.5]
        torch.manual_seed(0)
        assert torch.equal(projection(weight), drawn[0])
        assert torch.equal(projection.eval()(weight), projection(weight))
        assert projection(weight).tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5]

    def test_the_gradient_is_that_of_the_quantized_weight(self) -> None:
        weight, upstream = (normal(3, 5) / 10).requires_grad_(), normal(3, 5, seed=1)
        (ConnectedSigns(0.5, True)(weight) * upstream).sum().backward()
        torch.testing.assert_close(weight.grad, upstream)

    def test_real_weights_stay_between_the_values(self, digits_task: Any, trained_digits: nn.Module) -> None:
        config = BinaryConfig(method="binary-connect", finetune=Finetune(max_steps=10, lr=0.02))
        technique = implement(config)
        analysis = technique.analyze(trained_digits, digits_task)
        changed = technique.transform(copy.deepcopy(trained_digits), analysis, digits_task)
        latent = changed.fc1.parametrizations.weight.original
        limit = changed.fc1.weight.detach().abs().max()
        assert latent.abs().max() <= limit
        fit(changed, trained_digits, digits_task, config.finetune, rules=rules_for(technique, changed))
        assert latent.abs().max() == limit
        assert (latent.abs() == limit).float().mean() > 0.05

    def test_the_constants(self, quantized: Any) -> None:
        model = nn.Sequential(nn.Linear(10, 5), nn.Conv2d(6, 8, 3, groups=2))
        for layer, inputs, outputs in ((model[0], 10, 5), (model[1], 27, 36)):
            assert glorot(layer, layer.weight.shape) == pytest.approx(math.sqrt(1.5 / (inputs + outputs)), rel=1e-4)
        changed = quantized(model, BinaryConfig(method="binary-connect", keep_ends=False))
        for old, new in zip(model, changed, strict=True):
            assert new.weight.abs().unique().tolist() == [glorot(old, old.weight.shape)]
            assert torch.equal(new.weight.sign(), old.weight.sign())
        changed = quantized(model, BinaryConfig(method="binary-connect", scale="one", keep_ends=False))
        assert changed[0].weight.abs().unique().tolist() == [1.0]


def test_it_cannot_follow_a_pruning() -> None:
    prune, binary = {"technique": "pruning/magnitude", "amount": 0.5}, {"technique": "quantization/binary"}
    with pytest.raises(
        RecipeError, match="'pruning/magnitude' leaves zeros, and 'quantization/binary' would fill them"
    ):
        load_recipe({"steps": [prune, binary]})
    assert len(load_recipe({"steps": [prune, {"technique": "quantization/ternary"}]}).steps) == 2


def test_the_methods_train_to_different_weights(digits_task: Any, trained_digits: nn.Module, quantized: Any) -> None:
    results = [
        quantized(trained_digits, BinaryConfig(**options, finetune=Finetune(max_steps=5)), digits_task).fc1.weight
        for options in ({}, {"method": "loss-aware"}, {"gradient": "scaled"}, {"granularity": "tensor"})
    ]
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i])
