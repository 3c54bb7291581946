"""Trellis-coded quantization: the path against brute force, what it gains, training, the file."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import rarefy
import torch
from rarefy import artifact, compress, trellis
from rarefy.modules import Base
from rarefy.nouns import implement
from rarefy_quantization.trellis.config import TrellisConfig
from rarefy_quantization.trellis.technique import quantized
from rarefy_quantization.trellis.viterbi import Prices, best_path
from torch import nn


def cost(units: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], prices: Prices | None = None) -> float:
    """Return squared errors and prices of one column."""
    states = trellis.States(1)
    total = 0.0
    for unit, index in zip(units, indices, strict=True):
        (quantizer,) = states.classes()
        total += (unit - trellis.multiples(index, quantizer)) ** 2
        total += 0.0 if prices is None else float(prices.of(int(quantizer), index))
        states.advance(np.array([index]))
    return float(total)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("priced", [False, True])
def test_no_other_path_is_cheaper(seed: int, priced: bool) -> None:
    """All paths of five weights with indices from -2 to 2, which all near ones have."""
    draw = np.random.default_rng(seed)
    units = draw.uniform(-2.5, 2.5, (5, 1))
    # a price that grows with the magnitude, as that of a falling histogram
    prices = Prices(0.2 * np.abs(np.arange(-4, 5)) * np.ones((2, 1))) if priced else None
    indices, _ = best_path(units, np.ones((5, 1), bool), prices)
    best = min(
        cost(units[:, 0], np.array(choice), prices) for choice in itertools.product(range(-2, 3), repeat=len(units))
    )
    assert cost(units[:, 0], indices[:, 0], prices) == pytest.approx(best)


def test_quantizers_are_those_of_the_path_and_pruned_weights_stay() -> None:
    draw = np.random.default_rng(0)
    units = draw.normal(size=(80, 30)) * 3
    alive = draw.random((80, 30)) < 0.5
    indices, quantizers = best_path(units * alive, alive)
    values = trellis.multiples(indices, quantizers)
    assert not values[~alive].any()
    assert np.array_equal(trellis.indices(values), indices)


def test_the_error_is_the_published_one_below_that_of_even_grids() -> None:
    """At a fine step, 8 states gain 1.0 to 1.1 dB on rounding at equal rate (Marcellin & Fischer 1990, table 2)."""
    units = np.random.default_rng(0).uniform(-60, 60, (400, 100))
    indices, quantizers = best_path(units, np.ones(units.shape, bool))
    error = np.square(units - trellis.multiples(indices, quantizers)).mean()
    gain = 10 * np.log10(4 / 12 / error)  # either quantizer has a spacing of 2
    assert 0.95 < gain < 1.15


@pytest.mark.parametrize("rate", [2.0, 4.0])
def test_the_rate_is_the_wanted_one_and_the_file_has_it(rate: float, tmp_path: File) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    path = quantized(model[0].weight.detach(), rate)
    assert path.rate == pytest.approx(rate, abs=0.03)
    model[0].weight.data = path.decode()
    artifact.write(model, Base(lambda: model), tmp_path / "m.rarefy")
    (row,) = artifact.inspect(tmp_path / "m.rarefy")
    assert row.coding == "trellis"
    assert row.bits_per_element < rate + 0.05
    assert torch.equal(rarefy.load(tmp_path / "m.rarefy")[0].weight, path.decode())


def test_files_have_less_than_scalar_quantization_s_entropy_at_equal_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    path = quantized(weight, 4.0)
    wanted = (path.decode() - weight).square().mean()
    low, high = 1e-3, 1.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        error = ((weight / middle).round() * middle - weight).square().mean()
        low, high = (middle, high) if error < wanted else (low, middle)
    counts = (weight / low).round().unique(return_counts=True)[1].double()
    entropy = float(-(counts / counts.sum() * (counts / counts.sum()).log2()).sum())
    from rarefy.artifact import paths
    from rarefy.artifact.bits import to_bits

    part = paths.encode(to_bits(path.decode()), "float32", (256, 256))
    assert part is not None
    assert 8 * len(part) / weight.numel() < entropy - 0.12


def test_zeros_stay_and_layers_too_small_are_named(digits_task: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
        model[3].weight.copy_(torch.eye(10, 40))
    technique = implement(TrellisConfig(rate=3))
    analysis = technique.analyze(model, digits_task)
    assert [(s.name, "10 weights" in s.reason) for s in analysis.skipped] == [("3", True)]
    changed = technique.consolidate(technique.transform(copy.deepcopy(model), analysis, digits_task))
    assert not changed[1].weight[:, ::2].any()
    assert changed[1].weight[:, 1::2].any()
    assert type(changed[1].weight) is nn.Parameter


def test_weights_that_are_not_finite_are_refused(digits_task: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40))
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    with pytest.raises(rarefy.errors.StageError, match="1"):
        implement(TrellisConfig()).analyze(model, digits_task)


def test_fine_tuning_trains_the_steps_and_leaves_paths(trained_digits: nn.Module, digits_task: Any) -> None:
    recipe = {
        "steps": [{"technique": "quantization/trellis", "rate": 2, "finetune": {"epochs": 1, "lr": 0.001}}],
        "export": [{"format": "rarefy"}],
    }
    result = compress(trained_digits, recipe, task=digits_task)
    before = implement(TrellisConfig(rate=2)).analyze(trained_digits, digits_task).plan
    for name, path in before.items():
        after = result.model.get_parameter(name).detach()
        ratio = (after / path.decode())[path.multiple != 0]
        assert ratio.max() - ratio.min() < 1e-6
        assert ratio[0] != 1
    from rarefy.artifact import paths
    from rarefy.artifact.bits import to_bits

    assert all(
        paths.encode(to_bits(result.model.get_parameter(name)), "float32", tuple(path.multiple.shape)) is not None
        for name, path in before.items()
    )
