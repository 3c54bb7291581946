"""Vector quantization: the clustering, the codebook in training, and the file."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy import compress
from rarefy.artifact import inspect
from rarefy.tasks import ClassificationTask
from rarefy_quantization.config import VectorConfig
from rarefy_quantization.vectors import VectorQuantization, cluster
from torch import nn

TASK: Any = None  # it needs no data


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int, length: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, length, dtype=torch.float64, generator=generator(seed))


def error(x: torch.Tensor, codes: torch.Tensor) -> float:
    """Return the squared error of the means of clusters."""
    means = {code: x[codes == code].mean(0) for code in codes.unique().tolist()}
    return sum(float((row - means[code]).square().sum()) for row, code in zip(x, codes.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_many_starts_is_the_optimum(seed: int) -> None:
    x = rows(7, seed=seed)
    best = min(error(x, torch.tensor(codes)) for codes in itertools.product(range(3), repeat=7))
    found = [error(x, cluster(x, 3, 100, generator(start))[0]) for start in range(40)]
    assert min(found) == pytest.approx(best)


def test_it_ends_at_a_fixed_point_and_more_rounds_never_raise_the_error() -> None:
    x = rows(500, 4)
    codes, centroids = cluster(x, 16, 1000, generator())
    assert torch.equal(torch.cdist(x, centroids).argmin(1), codes)
    means = torch.stack([x[codes == code].mean(0) for code in range(16)])
    torch.testing.assert_close(centroids, means)
    errors = [float((centroids[codes] - x).square().sum()) for codes, centroids in
              (cluster(x, 16, n, generator()) for n in (1, 2, 4, 8, 1000))]  # fmt: skip
    assert errors == sorted(errors, reverse=True)


def test_few_distinct_rows_are_kept_as_they_are() -> None:
    x = rows(5, 3).repeat(20, 1)
    codes, centroids = cluster(x, 16, 100, generator())
    assert len(centroids) == 5
    torch.testing.assert_close(centroids[codes], x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


def changed(model: nn.Module, **options: Any) -> tuple[VectorQuantization, nn.Module, Any]:
    technique = VectorQuantization(VectorConfig(**options))
    analysis = technique.analyze(model, TASK)
    return technique, technique.transform(copy.deepcopy(model), analysis, TASK), analysis


def test_layers_take_few_vectors_and_are_plain_again() -> None:
    model = network()
    technique, quantized, analysis = changed(model, length=4, codes=20)
    plain = technique.consolidate(quantized)
    for i in (0, 3, 5):
        weight = plain[i].weight.detach()
        assert len(weight.reshape(-1, 4).unique(dim=0)) <= 20
        assert weight.shape == model[i].weight.shape
        assert type(plain[i]) is type(model[i])
    assert analysis.layers[0].action == "20 shared vectors of 4, 1.08 bits per weight"
    before, after = model[3].weight.detach(), plain[3].weight.detach()
    relative = (after - before).square().sum() / before.square().sum()
    assert analysis.layers[1].scores["relative_mse"] == pytest.approx(float(relative), rel=1e-5)


def test_what_does_not_fit_is_left_alone_with_its_reason() -> None:
    _, _, analysis = changed(network(), length=9, codes=50)
    reasons = {layer.name: layer.reason for layer in analysis.skipped}
    assert [layer.name for layer in analysis.layers] == ["0"]
    assert "64 weights each, no multiple of `length`, 9" in reasons["3"]
    _, _, analysis = changed(network(), length=4, codes=100)
    assert "it has 100 vectors of 4, and `codes` is 100" in {layer.reason for layer in analysis.skipped}


def test_the_gradient_of_a_vector_is_the_sum_over_its_places() -> None:
    model = network()
    _, quantized, analysis = changed(model, length=4, codes=20)
    x = torch.randn(6, 4, 4, 4, generator=generator())
    quantized(x).square().sum().backward()
    plain = copy.deepcopy(model)
    for i in (0, 3, 5):
        plain[i].weight.data = analysis.plan[f"{i}.weight"].decode()
    plain(x).square().sum().backward()
    coded = analysis.plan["3.weight"]
    wanted = torch.zeros_like(coded.codebook).index_add_(0, coded.codes, plain[3].weight.grad.reshape(-1, 4))
    torch.testing.assert_close(quantized[3].parametrizations.weight.original.grad, wanted)


def test_training_keeps_the_codes_and_the_file_is_small(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    """64 vectors of 4 weights are 1.5 bits per weight, and the codebooks come on top."""
    step = {"technique": "quantization/vector", "length": 4, "codes": 64, "targets": {"include": ["conv2", "fc1"]}}
    recipe = {"steps": [{**step, "finetune": {"epochs": 2, "lr": 1e-3}}], "evaluate": {"batch_sizes": []}}
    result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
    table = {row.tensor: row for row in inspect(tmp_path / "run" / "exports" / "model.rarefy")}
    weight = result.model.fc1.weight.detach()
    assert len(weight.reshape(-1, 4).unique(dim=0)) <= 64
    assert table["fc1.weight"].coding == "vectors"
    codebook = 64 * 4 * 32 / weight.numel()
    assert table["fc1.weight"].bits_per_element < math.log2(64) / 4 + codebook + 0.1
    assert digits_task.score(result.model, "test") > digits_task.score(trained_digits, "test") - 0.03
