"""Weight sharing at a rate: the least sum of error and bits, and one price of a bit in all layers."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.tasks import ClassificationTask
from rarefy_quantization.codes import Coded
from rarefy_quantization.config import EntropyConstrainedConfig, KMeansConfig
from rarefy_quantization.entropy_constrained import EntropyConstrained, bits_of, share
from rarefy_quantization.kmeans import KMeans
from rarefy_quantization.lloyd import lloyd, nearest
from torch import nn


def normal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cost(values: torch.Tensor, importance: torch.Tensor, codes: torch.Tensor, price: float) -> float:
    """Return the weighted squared error to the weighted means, and the price of the entropy."""
    counts = torch.bincount(codes)
    total = price * sum(float(n) * math.log2(len(codes) / n) for n in counts.tolist() if n)
    for code in counts.nonzero().flatten():
        inside, h = values[codes == code], importance[codes == code]
        mean = (h * inside).sum() / h.sum()
        total += float((h * (inside - mean).square()).sum())
    return total


@pytest.mark.parametrize("price", [0.0, 0.02, 0.2, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_many_starts_is_the_least_of_all_assignments(price: float, seed: int) -> None:
    values, importance = normal(7, seed), normal(7, seed + 10).exp()
    assignments = (torch.tensor(codes) for codes in itertools.product(range(3), repeat=len(values)))
    best = min(cost(values, importance, codes, price) for codes in assignments)
    found = []
    for start in itertools.combinations(values.tolist(), 3):
        codes, levels = share(values, importance, torch.tensor(sorted(start), dtype=torch.float64), price, 100)
        assert len(levels) == len(codes.unique())
        found.append(cost(values, importance, codes, price))
    assert min(found) == pytest.approx(best, rel=1e-9)


def test_no_round_raises_the_sum() -> None:
    values, importance = normal(2000), normal(2000, 1).exp()
    start = torch.linspace(-4, 4, 32, dtype=torch.float64)
    costs = [cost(values, importance, share(values, importance, start, 0.01, n)[0], 0.01) for n in (1, 2, 4, 8, 16, 99)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.995 * costs[0]


def test_free_bits_are_k_means_and_dear_ones_leave_one_value() -> None:
    values = normal(500)
    ones, start = torch.ones_like(values), torch.linspace(-3, 3, 8, dtype=torch.float64)
    codes, levels = share(values, ones, start, 0.0, 1000)
    torch.testing.assert_close(levels, lloyd(values.sort().values, start, 1000))
    assert torch.equal(codes, nearest(values, levels))
    codes, levels = share(values, ones, start, 1e6, 100)
    assert len(levels) == 1
    torch.testing.assert_close(levels[0], values.mean())


def test_weighted_k_means_is_k_means_of_repeated_values() -> None:
    values, repeats = normal(60).sort().values, torch.randint(1, 5, (60,), generator=torch.Generator().manual_seed(0))
    start = torch.linspace(-2, 2, 5, dtype=torch.float64)
    weighted = lloyd(values, start, 1000, repeats.double())
    torch.testing.assert_close(weighted, lloyd(values.repeat_interleave(repeats), start, 1000))


def entropies(model: nn.Module, **options: Any) -> tuple[list[float], float, EntropyConstrained]:
    """Return the entropy of each layer's weights, the mean over the weights, and the technique."""
    technique = EntropyConstrained(EntropyConstrainedConfig(**options))
    plan = technique.analyze(model, None).plan  # type: ignore[arg-type]
    coded: list[Coded] = list(plan.values())
    sizes = [c.codes.numel() for c in coded]
    each = [c.entropy() for c in coded]
    return each, sum(n * e for n, e in zip(sizes, each, strict=True)) / sum(sizes), technique


class TestRate:
    @pytest.mark.parametrize("rate", [1.0, 2.5, 4.0])
    def test_the_mean_rate_is_reached(self, rate: float) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 50))
        _, mean, technique = entropies(model, rate=rate)
        assert mean == pytest.approx(rate, abs=0.08)
        assert technique.notes == []

    def test_layers_of_larger_weights_get_more_bits(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
        for layer, deviation in zip(model, (0.1, 0.8), strict=True):
            nn.init.normal_(layer.weight, std=deviation)
        (small, large), mean, _ = entropies(model, rate=2.0)
        assert mean == pytest.approx(2.0, abs=0.08)
        # at a high rate eight times the deviation is three bits more; here the small one is near its end
        assert 3 < large - small < 4

    def test_it_beats_k_means_at_the_same_entropy(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(100, 100)
        plain = KMeans(KMeansConfig(bits=3)).code(weight, 3, seed=0)
        technique = EntropyConstrained(EntropyConstrainedConfig(rate=plain.entropy()))
        technique.prepare({"weight": weight}, {})
        coded = technique.code(weight, 6, seed=0)
        assert coded.entropy() < plain.entropy() + 0.02
        errors = [float((c.decode() - weight).square().sum()) for c in (plain, coded)]
        assert errors[1] < 0.9 * errors[0]

    @pytest.mark.parametrize("price", [0.4, 0.1, 0.02])
    def test_gaussian_weights_are_coded_as_well_as_scalars_can_be(self, price: float) -> None:
        """The best scalar quantizer of a Gaussian loses 1.53 dB to rate-distortion theory, less at few bits."""
        values = normal(20000)
        step = (6 * price / math.log(2)) ** 0.5
        codes, levels = share(values, torch.ones_like(values), step * torch.arange(-30.0, 31.0).double(), price, 100)
        rate = float(bits_of(torch.bincount(codes))[codes].mean())
        signal_to_noise = -10 * math.log10(float((levels[codes] - values).square().mean()))
        assert 20 * math.log10(2) * rate - signal_to_noise < 1.65

    def test_zeros_stay_and_more_than_the_codes_can_have_is_said(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60))
        model[0].weight.data[torch.rand(60, 40) < 0.5] = 0
        zeros = model[0].weight == 0
        technique = EntropyConstrained(EntropyConstrainedConfig(rate=7.5, bits=3))
        changed = technique.transform(copy.deepcopy(model), technique.analyze(model, None), None)  # type: ignore[arg-type]
        weight = technique.consolidate(changed)[0].weight
        assert torch.equal(weight == 0, zeros)
        assert "raise `bits`" in technique.notes[0]

    def test_bad_rates_are_refused(self) -> None:
        for rate in (0, 9, None):
            with pytest.raises(ValidationError, match="rate"):
                EntropyConstrainedConfig(rate=rate)


def test_curvature_protects_what_the_loss_feels(trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    """At one bit and a half a weight, less loss by curvature than without."""
    from rarefy.sensitivity import Increase

    increase = Increase(trained_digits, digits_task, batches=10)
    losses = {}
    for importance in ("none", "curvature"):
        config = EntropyConstrainedConfig(rate=1.5, importance=importance, batches=2, probes=4)
        assert config.needed_data() == ("none" if importance == "none" else "labelled")
        technique = EntropyConstrained(config)
        changed = technique.transform(
            copy.deepcopy(trained_digits), technique.analyze(trained_digits, digits_task), digits_task
        )
        losses[importance] = increase(technique.consolidate(changed))
    assert losses["curvature"] < losses["none"]


def test_bits_of_shares() -> None:
    torch.testing.assert_close(bits_of(torch.tensor([4, 2, 2])), torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64))
