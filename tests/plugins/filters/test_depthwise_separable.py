"""A depthwise separable block starts as the nearest one to the trained kernel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.nouns import implement
from rarefy.pipeline import run
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy.technique import Plan, Skip
from rarefy_filters.config import DepthwiseSeparableConfig
from torch import nn


def block(layer: nn.Conv2d, multiplier: int, **options: Any) -> tuple[nn.Module, float]:
    technique = implement(DepthwiseSeparableConfig(multiplier=multiplier, **options))
    made = technique.build(layer)
    return made, technique.fill_(made, layer)


@pytest.mark.parametrize("multiplier", [3, 6])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "circular", "bias": False},
        {"padding": 1, "padding_mode": "reflect", "stride": 3},
    ],
)
def test_a_kernel_of_that_rank_is_reproduced(options: dict[str, Any], multiplier: int) -> None:
    """Either the kernel has low rank per channel, or the multiplier reaches its full rank of min(out, taps)."""
    layer = nn.Conv2d(4, 6, 3, **options)
    if multiplier == 3:
        with torch.no_grad():
            outer, inner = torch.randn(4, 6, 3), torch.randn(4, 3, 9)
            layer.weight.copy_((outer @ inner).permute(1, 0, 2).reshape(6, 4, 3, 3))
    made, error = block(layer, multiplier)
    x = torch.randn(2, 4, 11, 10)
    assert torch.allclose(made(x), layer(x), atol=1e-4)
    assert error < 1e-6


def test_the_error_is_that_of_the_dropped_singular_values_of_each_channel() -> None:
    layer = nn.Conv2d(5, 8, 3)
    made, error = block(layer, 2)
    singular = torch.linalg.svdvals(layer.weight.detach().permute(1, 0, 2, 3).reshape(5, 8, 9))
    by_hand = (singular[:, 2:].square().sum() / singular.square().sum()).sqrt()
    assert error == pytest.approx(float(by_hand), rel=1e-5)
    depthwise, pointwise = made[0].weight.detach().reshape(5, 2, 9), made[1].weight.detach().reshape(8, 5, 2)
    kernel = torch.einsum("ncm,cmt->nct", pointwise, depthwise).reshape(8, 5, 3, 3)
    weight = layer.weight.detach()
    found = torch.linalg.norm(kernel - weight) / torch.linalg.norm(weight)
    assert float(found) == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 1), "1 x 1 already"),
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups already"),
        (nn.Conv2d(4, 1, 3), "would not have fewer parameters"),
        (nn.Conv2d(4, 3, (1, 2)), "would not have fewer parameters"),  # 5 < 6 weights, but 2 more to normalize
    ],
)
def test_what_is_left_alone(layer: nn.Conv2d, reason: str) -> None:
    skip = implement(DepthwiseSeparableConfig(batchnorm=True)).plan("x", layer)
    assert isinstance(skip, Skip)
    assert reason in skip.reason


def test_a_normalization_goes_between_and_follows_the_type() -> None:
    layer = nn.Conv2d(3, 8, 3).double()
    made, _ = block(layer, 8, batchnorm=True)
    assert [type(child) for child in made] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert torch.allclose(made.eval()(x), layer(x), atol=1e-4)


def test_a_dry_run_predicts_the_shapes(trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    technique = implement(DepthwiseSeparableConfig(multiplier=2))
    predicted = technique.predict(copy.deepcopy(trained_digits).to("meta")).state_dict()
    analysis = technique.analyze(trained_digits, digits_task)
    assert all(isinstance(plan, Plan) for plan in analysis.plan.values())
    done = technique.transform(trained_digits, analysis, digits_task).state_dict()
    assert {k: v.shape for k, v in predicted.items()} == {k: v.shape for k, v in done.items()}


def test_it_learns_again_with_a_fraction_of_the_work(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    step = {"technique": "filters/depthwise-separable", "finetune": {"epochs": 4, "lr": 0.002}}
    recipe = load_recipe({"steps": [step], "evaluate": {"batch_sizes": []}})
    report = run(recipe, tmp_path, model=trained_digits, task=digits_task).report
    assert report.steps[0].value("flops") < report.baseline.value("flops") / 2
    assert report.test[1].value > report.test[0].value - 0.04
