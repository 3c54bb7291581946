"""Product quantization: blocks of columns, their codebooks in training, and the file."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy import compress
from rarefy.artifact import inspect
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.tasks import ClassificationTask
from rarefy_quantization.codebooks.config import ProductConfig
from rarefy_quantization.codebooks.product import cluster_blocks
from rarefy_quantization.config import VectorConfig
from torch import nn

TASK: Any = None  # it needs no data


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


def changed(model: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    technique = implement(config)
    analysis = technique.analyze(model, TASK)
    return technique.consolidate(technique.transform(copy.deepcopy(model), analysis, TASK)), analysis


def test_each_block_has_few_vectors_which_are_the_means_of_those_that_use_them() -> None:
    tensor = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coded = cluster_blocks(tensor, 2, [0, 1, 3, 6], 8, 1000, 0)
    quantized, exact = coded.decode().view(200, 6, 2), tensor.view(200, 6, 2)
    for first, last in ((0, 1), (1, 3), (3, 6)):
        vectors, users = quantized[:, first:last].reshape(-1, 2).unique(dim=0, return_inverse=True)
        assert len(vectors) == 8
        for i, vector in enumerate(vectors):
            torch.testing.assert_close(exact[:, first:last].reshape(-1, 2)[users == i].mean(0), vector)
    assert len(coded.codebook) == 24


@pytest.mark.parametrize(("blocks", "distinct"), [(None, [8] * 16), (3, [8] * 3), (100, [8] * 16), (1, [8])])
def test_a_row_is_divided_into_nearly_equal_blocks(blocks: int | None, distinct: list[int]) -> None:
    plain, analysis = changed(network(), ProductConfig(codes=8, blocks=blocks, targets={"include": ["3"]}))
    grid = plain[3].weight.detach().view(40, 16, 4)
    edges = [i * 16 // len(distinct) for i in range(len(distinct) + 1)]
    pieces = [grid[:, a:b].reshape(-1, 4) for a, b in itertools.pairwise(edges)]
    assert [len(piece.unique(dim=0)) for piece in pieces] == distinct
    assert analysis.layers[0].action.startswith(f"{len(distinct)} x 8 shared vectors of 4, 0.75 bits")
    before = network()[3].weight.detach()
    relative = (plain[3].weight.detach() - before).square().sum() / before.square().sum()
    assert analysis.layers[0].scores["relative_mse"] == pytest.approx(float(relative), rel=1e-5)


def test_one_block_is_vector_quantization_and_more_blocks_lower_the_error() -> None:
    one, _ = changed(network(), ProductConfig(codes=8, blocks=1))
    vector, _ = changed(network(), VectorConfig(codes=8))
    assert all(torch.equal(one[i].weight, vector[i].weight) for i in (0, 3, 5))
    errors = [changed(network(), ProductConfig(codes=8, blocks=blocks))[1].layers[1].scores["relative_mse"]
              for blocks in (1, 4, 16)]  # fmt: skip
    assert errors == sorted(errors, reverse=True)


def test_what_does_not_fit_is_left_alone_with_its_reason() -> None:
    _, analysis = changed(network(), ProductConfig(length=9, codes=15, blocks=4))
    reasons = {layer.name: layer.reason for layer in analysis.skipped}
    assert [layer.name for layer in analysis.layers] == ["0"]
    assert "64 weights each, no multiple of `length`, 9" in reasons["3"]
    _, analysis = changed(network(), ProductConfig(length=4, codes=30))
    assert {layer.name: layer.reason for layer in analysis.skipped} == {
        "0": "a block has 16 vectors of 4, and `codes` is 30",
        "5": "a block has 10 vectors of 4, and `codes` is 30",
    }


@pytest.mark.parametrize(
    ("options", "told"), [({"blocks": 0}, "blocks"), ({"codes": 1}, "codes"), ({"length": 5}, "length")]
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ProductConfig(**options)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = network()
    model[3].weight.data[0, 0] = math.nan
    with pytest.raises(StageError, match=r"'3'.*NaN or infinite"):
        changed(model, ProductConfig())


@pytest.mark.parametrize("blocks", [None, 4])
def test_training_keeps_the_codes_and_the_file_has_a_codebook_per_block(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path, blocks: int | None
) -> None:
    """Ranks among the vectors of a block cost log2(codes); among those of all blocks, log2(blocks) more."""
    step = {"technique": "quantization/product", "codes": 8, "blocks": blocks, "targets": {"include": ["fc1"]}}
    recipe = {"steps": [{**step, "finetune": {"epochs": 2, "lr": 1e-3}}], "evaluate": {"batch_sizes": []}}
    result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
    table = {row.tensor: row for row in inspect(tmp_path / "run" / "exports" / "model.rarefy")}
    weight = result.model.fc1.weight.detach()
    rows, places = weight.shape[0], weight.shape[1] // 4
    count = blocks or places
    grid = weight.view(rows, count, places // count, 4)
    assert all(len(grid[:, block].reshape(-1, 4).unique(dim=0)) <= 8 for block in range(count))
    assert table["fc1.weight"].coding == "vectors"
    bits = weight.numel() / 4 * 3 + count * 8 * 4 * 32
    assert table["fc1.weight"].bytes * 8 < 1.02 * bits + count * 40 * 8
    assert digits_task.score(result.model, "test") > digits_task.score(trained_digits, "test") - 0.03
