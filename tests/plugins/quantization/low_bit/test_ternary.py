"""Ternary weights against brute force over thresholds, finite differences and the papers' formulas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.training import fit
from rarefy_quantization.grids import Units
from rarefy_quantization.low_bit.config import TernaryConfig
from rarefy_quantization.low_bit.thresholds import Thresholded, TrainedTernary, approximate, exact
from rarefy_schemas import Finetune
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(w: np.ndarray, kept: np.ndarray) -> float:
    """Return the squared error of the best -a, 0, a with the given weights kept."""
    scale = abs(w[kept]).mean() if kept.any() else 0.0
    return float(((w - scale * np.sign(w) * kept) ** 2).sum())


class TestThresholds:
    @pytest.mark.parametrize("seed", range(5))
    def test_the_exact_one_is_the_best_of_all_subsets(self, seed: int) -> None:
        weight = normal(4, 9, seed=seed)
        weight[1] = weight[1].round()  # ties and zeros
        weight[2, 3:] = 0
        kept = exact(weight.abs())
        for w, own in zip(weight.double().numpy(), kept.numpy(), strict=True):
            subsets = [np.array([bool(bits >> i & 1) for i in range(w.size)]) for bits in range(2**w.size)]
            assert error(w, own) == pytest.approx(min(error(w, subset) for subset in subsets), rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_approximate_one_is_never_better_and_hardly_worse(self, seed: int) -> None:
        weight = normal(16, 200, seed=seed)
        for w, rough, best in zip(
            weight.double().numpy(), approximate(weight.abs()).numpy(), exact(weight.abs()).numpy(), strict=True
        ):
            assert error(w, best) <= error(w, rough) <= 1.05 * error(w, best)

    @pytest.mark.parametrize(
        ("distribution", "expected"),
        [
            (torch.distributions.Uniform(-1.0, 1.0), 2 / 3),
            (torch.distributions.Normal(0.0, 1.0), 0.77),
            (torch.distributions.Laplace(0.0, 1.0), 1.0),
        ],
    )
    def test_the_exact_one_of_known_distributions(self, distribution: Any, expected: float) -> None:
        torch.manual_seed(0)
        magnitudes = distribution.sample((1, 400_000)).abs()
        threshold = magnitudes[exact(magnitudes)].min() / magnitudes.mean()
        assert float(threshold) == pytest.approx(expected, abs=0.04)

    def test_weights_that_were_pruned_do_not_lower_the_approximate_one(self) -> None:
        weight = normal(1, 100)
        pruned = torch.cat([weight, torch.zeros(1, 900)], 1)
        assert torch.equal(approximate(pruned.abs())[:, :100], approximate(weight.abs()))

    def test_nothing_is_kept_of_zeros(self) -> None:
        zeros = torch.zeros(2, 5)
        assert not exact(zeros).any()
        assert not approximate(zeros).any()


class TestThresholded:
    @pytest.mark.parametrize("exactly", [True, False])
    def test_the_scale_is_the_mean_of_what_is_kept(self, exactly: bool) -> None:
        weight = normal(4, 20)
        quantized = Thresholded(Units.of(weight.shape, "channel", 80), exactly)(weight).double().numpy()
        kept = (exact if exactly else approximate)(weight.abs()).numpy()
        w = weight.double().numpy()
        for row in range(4):
            expected = abs(w[row][kept[row]]).mean() * np.sign(w[row]) * kept[row]
            np.testing.assert_allclose(quantized[row], expected, rtol=2e-5)

    def test_the_gradient_is_that_of_the_quantized_weight(self) -> None:
        weight, upstream = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
        (Thresholded(Units.of(weight.shape, "tensor", 15), False)(weight) * upstream).sum().backward()
        torch.testing.assert_close(weight.grad, upstream)


class TestTrainedTernary:
    def test_the_scales_begin_as_the_means_of_either_side(self) -> None:
        weight = torch.tensor([[4.0, 2.0, 0.1, -0.1, -1.0, 0.0]])
        projection = TrainedTernary(weight, 0.05)
        assert projection.scales.tolist() == [3.0, 1.0]
        latent = projection.start(weight)
        assert latent.abs().max() == 1
        assert projection(latent).tolist() == [[3.0, 3.0, 0.0, 0.0, -1.0, 0.0]]
        one_sided = TrainedTernary(weight.abs(), 0.05)
        assert one_sided.scales[0] == one_sided.scales[1]

    def test_gradients_of_the_scales_are_those_of_finite_differences(self) -> None:
        weight, target = normal(6, 7).double(), normal(6, 7, seed=1).double()
        projection = TrainedTernary(weight, 0.3)
        latent = projection.start(weight)

        def loss() -> torch.Tensor:
            return ((projection(latent) - target).square() * target.abs()).sum()

        loss().backward()
        for side in (0, 1):
            step, values = 1e-5, []
            for move in (step, -step):
                with torch.no_grad():
                    projection.factor[side] += move / projection.first[side]
                    values.append(float(loss()))
                    projection.factor[side] -= move / projection.first[side]
            slope = (values[0] - values[1]) / (2 * step)
            # SGD of rate r moves the scale, which is the factor times the first one, by r times this
            moved = float(projection.factor.grad[side] * projection.first[side])
            count = int((latent > 0.3).sum() if side == 0 else (latent < -0.3).sum())
            assert moved * count == pytest.approx(slope, rel=1e-5)

    def test_gradients_are_the_papers_with_the_right_sign(self) -> None:
        latent = torch.tensor([[1.0, 0.6, 0.04, -0.02, -0.5, -0.9]], requires_grad=True)
        projection = TrainedTernary(latent.detach(), 0.05)
        with torch.no_grad():
            projection.first.copy_(torch.tensor([2.0, 3.0]))
        upstream = torch.tensor([[1.0, -3.0, 5.0, 7.0, 11.0, 13.0]])
        (projection(latent) * upstream).sum().backward()
        assert latent.grad.tolist() == [[2.0, -6.0, 5.0, 7.0, 33.0, 39.0]]
        moved = (projection.factor.grad * projection.first).tolist()
        assert moved == pytest.approx([(1.0 - 3.0) / 2, -(11.0 + 13.0) / 2])

    def test_a_scale_never_turns_negative(self) -> None:
        projection = TrainedTernary(normal(2, 5), 0.05)
        with torch.no_grad():
            projection.factor.fill_(-3)
        assert (projection.scales > 0).all()

    def test_scales_are_learned_apart(self, digits_task: Any, trained_digits: nn.Module, quantized: Any) -> None:
        config = TernaryConfig(method="ttq", finetune=Finetune(epochs=1))
        first = quantized(trained_digits, TernaryConfig(method="ttq"), digits_task).fc1.weight.unique()
        values = quantized(trained_digits, config, digits_task).fc1.weight.unique()
        assert len(values) == 3
        assert values[1] == 0
        assert (values[[0, 2]] != first[[0, 2]]).all()
        assert values[0] != -values[2]

    def test_sgd_trains_them_at_rates_that_suit_weights(
        self, digits_task: Any, trained_digits: nn.Module, quantized: Any
    ) -> None:
        config = TernaryConfig(method="ttq", finetune=Finetune(epochs=3, optimizer="sgd", lr=0.05))
        trained = quantized(trained_digits, config, digits_task)
        assert digits_task.score(trained, "test") >= digits_task.score(trained_digits, "test") - 0.03


@pytest.mark.parametrize("options", [{}, {"threshold": "exact"}, {"method": "ttq"}])
def test_zeros_stay_zero_in_training(options: dict[str, Any], digits_task: Any, trained_digits: nn.Module) -> None:
    with torch.no_grad():
        trained_digits.fc1.weight[trained_digits.fc1.weight.abs() < 0.02] = 0
    zeros = trained_digits.fc1.weight == 0
    config = TernaryConfig(**options, finetune=Finetune(max_steps=10, lr=1e-2))
    technique = implement(config)
    analysis = technique.analyze(trained_digits, digits_task)
    changed = technique.transform(copy.deepcopy(trained_digits), analysis, digits_task)
    fit(changed, trained_digits, digits_task, config.finetune, rules=rules_for(technique, changed))
    plain = technique.consolidate(changed)
    assert not plain.fc1.weight[zeros].any()
    assert plain.fc1.weight[~zeros].count_nonzero() > 0.4 * (~zeros).sum()
