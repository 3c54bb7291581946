"""Residual quantization: the stages, the joint fit, layers that keep codes, and the file."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rarefy
import torch
from pydantic import ValidationError
from rarefy import artifact, compress
from rarefy.artifact import inspect
from rarefy.errors import ArtifactError, StageError
from rarefy.modules import Base, build, describe
from rarefy.nouns import implement
from rarefy.tasks import ClassificationTask
from rarefy_quantization.codebooks.config import ResidualConfig
from rarefy_quantization.codebooks.layers import ResidualConv, ResidualLayer, ResidualLinear
from rarefy_quantization.codebooks.residual import by_frequency, fitted
from rarefy_quantization.config import VectorConfig
from rarefy_schemas import ModelSpec
from torch import nn

TASK: Any = None  # it needs no data


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))


def changed(model: nn.Module, config: Any) -> tuple[Any, Any]:
    technique = implement(config)
    analysis = technique.analyze(model, TASK)
    return technique.consolidate(technique.transform(copy.deepcopy(model), analysis, TASK)), analysis


def residual(model: nn.Module, **options: Any) -> Any:
    return changed(model, ResidualConfig(**options))[0]


def relative(layer: nn.Module, before: nn.Module) -> float:
    change = (layer.weight.detach() - before.weight.detach()).square().sum()
    return float(change / before.weight.detach().square().sum())


class TestStages:
    @pytest.mark.parametrize("joint", [True, False])
    def test_one_stage_is_vector_quantization(self, joint: bool) -> None:
        # few rounds, so that the means of k-means are not those of its last codes
        one = residual(network(), codes=8, stages=1, joint=joint, rounds=2)
        vector, _ = changed(network(), VectorConfig(codes=8, rounds=2))
        assert all(torch.equal(one[i].weight, vector[i].weight) for i in (0, 3, 5))

    @pytest.mark.parametrize("joint", [True, False])
    def test_every_stage_lowers_the_error_and_the_report_tells_it(self, joint: bool) -> None:
        errors = []
        for stages in (1, 2, 3, 4):
            config = ResidualConfig(codes=8, stages=stages, joint=joint, targets={"include": ["3"]})
            model, analysis = changed(network(), config)
            errors.append(relative(model[3], network()[3]))
            assert analysis.layers[0].scores["relative_mse"] == pytest.approx(errors[-1], rel=1e-5)
        assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(errors))

    def test_a_stage_is_k_means_of_what_those_before_it_left(self) -> None:
        one, two = (residual(network(), codes=8, stages=stages, joint=False) for stages in (1, 2))
        left = (network()[3].weight - one[3].weight).detach().reshape(-1, 4)
        codes, book = two[3].codes[1], two[3].codebooks[1].detach()
        assert torch.equal(two[3].codebooks[0], one[3].codebooks[0])
        assert torch.equal(torch.cdist(left, book).argmin(1), codes.long())
        for code in range(8):
            torch.testing.assert_close(book[code], left[codes == code].mean(0), atol=1e-6, rtol=1e-5)

    def test_what_the_first_stages_say_exactly_leaves_zeros(self) -> None:
        model = network()
        weight = model[3].weight
        weight.data = torch.randn(3, 4)[torch.arange(640) % 3].reshape(weight.shape)
        layer = residual(model, codes=8, stages=3, targets={"include": ["3"]})[3]
        assert torch.equal(layer.weight, weight)
        assert layer.codebooks.shape == (3, 3, 4)

    def test_frequent_codes_are_small(self) -> None:
        book = torch.arange(4.0).unsqueeze(1)
        codes, sorted_book = by_frequency(torch.tensor([2, 2, 0, 3, 2, 3]), book)
        assert codes.tolist() == [0, 0, 2, 1, 0, 1]
        assert sorted_book.flatten().tolist() == [2, 3, 0, 1]


class TestJointFit:
    def test_it_is_least_squares(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(90, 3, dtype=torch.float64, generator=generator)
        codes = torch.randint(6, (3, 90), generator=generator)
        start = torch.randn(3, 7, 3, dtype=torch.float64, generator=generator)  # one vector that nothing uses
        found = fitted(rows, codes, start)
        design = np.zeros((90, 3 * 7))
        for stage in range(3):
            design[np.arange(90), 7 * stage + codes[stage].numpy()] = 1
        best, *_ = np.linalg.lstsq(design, rows.numpy(), rcond=None)
        assert np.allclose(design @ found.reshape(21, 3).numpy(), design @ best, atol=1e-5)
        assert torch.equal(found[:, 6], start[:, 6])

    def test_it_lowers_the_error_and_leaves_the_codes(self) -> None:
        plain, joint = (residual(network(), codes=16, stages=3, joint=joint) for joint in (False, True))
        for i in (0, 3):
            assert torch.equal(plain[i].codes, joint[i].codes)
            assert relative(joint[i], network()[i]) < relative(plain[i], network()[i])

    def test_what_cannot_be_better_stays(self) -> None:
        rows = torch.randn(20, 2, dtype=torch.float64)
        book = torch.stack([rows, torch.zeros_like(rows)])
        assert torch.equal(fitted(rows, torch.arange(20).expand(2, 20), book), book)


class TestLayers:
    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Linear(8, 6, bias=False), (2, 5, 8)),
            (nn.Conv1d(4, 8, 3, padding=2, padding_mode="circular", stride=2), (2, 4, 9)),
            (nn.Conv2d(8, 12, (3, 2), padding="same", dilation=(1, 2), groups=2), (2, 8, 6, 7)),
            (nn.Conv2d(2, 24, 2, padding=(1, 0), padding_mode="reflect"), (2, 2, 6, 7)),
            (nn.Conv3d(2, 8, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1)), (2, 2, 4, 5, 6)),
        ],
    )
    def test_they_compute_with_the_sum_of_their_vectors(self, layer: Any, shape: tuple[int, ...]) -> None:
        model = residual(nn.Sequential(layer), length=2, codes=3, stages=2).eval()
        by_hand = copy.deepcopy(layer)
        pairs = zip(model[0].codebooks, model[0].codes, strict=True)
        by_hand.weight.data = sum(book[codes.long()] for book, codes in pairs).reshape(layer.weight.shape)
        x = torch.randn(shape)
        torch.testing.assert_close(model(x), by_hand(x))

    def test_the_gradient_of_a_vector_is_the_sum_over_its_places_in_every_stage(self) -> None:
        quantized, plain = residual(network(), codes=8), copy.deepcopy(network())
        x = torch.randn(6, 4, 4, 4)
        for i in (0, 3, 5):
            plain[i].weight.data = quantized[i].weight.detach()
        quantized(x).square().sum().backward()
        plain(x).square().sum().backward()
        for stage in range(2):
            rows, codes = plain[3].weight.grad.reshape(-1, 4), quantized[3].codes[stage].int()
            wanted = torch.zeros(8, 4).index_add_(0, codes, rows)
            torch.testing.assert_close(quantized[3].codebooks.grad[stage], wanted)

    @pytest.mark.parametrize(("count", "dtype"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
    def test_codes_take_the_smallest_integers(self, count: int, dtype: torch.dtype) -> None:
        layer = ResidualLinear(4, 3, 2, count, 4)
        assert layer.codes.dtype == dtype
        layer.codes[:] = count - 1
        layer.codebooks.data[:, -1] = 1
        assert torch.equal(layer.weight, torch.full((3, 4), 2.0))

    def test_they_can_be_exported(self) -> None:
        model, x = residual(network(), codes=8).eval(), torch.randn(2, 4, 4, 4)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    def test_state_and_copies_hold_all_of_it(self) -> None:
        model, x = residual(network(), codes=8), torch.randn(2, 4, 4, 4)
        other = copy.deepcopy(model)
        for layer in (other[0], other[3], other[5]):
            layer.codebooks.data.zero_()
            layer.codes.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))
        assert set(model.state_dict()) == {f"{i}.{name}" for i in (0, 3, 5) for name in ("codebooks", "codes", "bias")}

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [((0, 4, 4), "not 0 stages of 4"), ((2, 65537, 4), "not 2 stages of 65537"), ((1, 4, 3), "vectors of 3")],
    )
    def test_arguments_that_cannot_be_are_refused(self, arguments: tuple[int, int, int], told: str) -> None:
        with pytest.raises(StageError, match=told):
            ResidualLinear(4, 3, *arguments)


class TestFile:
    def test_its_bytes_are_those_of_entropy_coded_codes_and_of_codebooks(self, tmp_path: Path) -> None:
        model = network()
        quantized, path, x = residual(model, codes=8, stages=3), tmp_path / "model.rarefy", torch.randn(2, 4, 4, 4)
        artifact.write(quantized.eval(), Base(lambda: copy.deepcopy(model)), path)
        loaded = artifact.load(path, base=lambda: copy.deepcopy(model))
        for i in (0, 3, 5):
            assert torch.equal(loaded[i].codes, quantized[i].codes)
            assert torch.equal(loaded[i].codebooks, quantized[i].codebooks)
        assert torch.equal(loaded(x), quantized(x))
        table = {row.tensor: row for row in inspect(path)}
        assert table["3.codes"].dtype == "uint8"
        # 640 vectors in three stages of at most three bits, with a histogram, against a byte each
        assert table["3.codes"].bytes < 3 * 640 * 3 / 8 + 30
        assert table["3.codebooks"].bytes <= 3 * 8 * 4 * 4
        assert "3.weight" not in table

    def test_arguments_of_a_file_that_cannot_be_are_refused(self) -> None:
        root = describe(residual(network(), codes=8), Base(network)).root
        assert root is not None
        children = dict(root.children)
        bad = {**children["3"].arguments, "length": 5}
        children["3"] = children["3"].model_copy(update={"arguments": bad})
        spec = ModelSpec(root=root.model_copy(update={"children": children}))
        with pytest.raises(ArtifactError, match="cannot be cut into vectors of 5"):
            build(spec)

    def test_training_moves_codebooks_and_later_steps_see_them(
        self, trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
    ) -> None:
        step = {"technique": "quantization/residual", "codes": 16, "targets": {"include": ["conv2", "fc1"]}}
        start, _ = changed(trained_digits, ResidualConfig(codes=16, targets={"include": ["conv2", "fc1"]}))
        recipe = {
            "steps": [
                {**step, "finetune": {"epochs": 1, "lr": 1e-3}},
                {"technique": "quantization/precision", "bits": 8},
            ],
            "evaluate": {"batch_sizes": []},
        }
        result = compress(trained_digits, recipe, digits_task, directory=tmp_path / "run")
        layer = result.model.fc1
        assert isinstance(layer, ResidualLinear)
        assert not torch.equal(layer.codebooks, start.fc1.codebooks)
        book = layer.codebooks.detach()
        assert torch.equal(book, book.bfloat16().float())
        table = {row.tensor: row for row in inspect(tmp_path / "run" / "exports" / "model.rarefy")}
        size = layer.codebooks.numel()
        assert table["fc1.codes"].bits_per_element < math.log2(16) + 0.1
        assert table["fc1.codebooks"].bytes < 2.1 * size
        assert digits_task.score(result.model, "test") > digits_task.score(trained_digits, "test") - 0.03


class TestTechnique:
    def test_layers_that_share_a_weight_share_codes_and_codebooks(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        model[2].weight = model[0].weight
        model.append(model[0])
        tied = copy.deepcopy(residual(model, codes=8))
        assert tied[0] is tied[4]
        assert isinstance(tied[2], ResidualLayer)
        assert tied[0].codebooks is tied[2].codebooks
        assert tied[0].codes is tied[2].codes
        assert tied[0].bias is not tied[2].bias

    def test_plain_layers_compute_the_same(self) -> None:
        model = network().train()
        quantized = residual(model, codes=8)
        plain = rarefy.plain(quantized)
        x = torch.randn(2, 4, 4, 4)
        assert [type(layer) for layer in plain] == [type(layer) for layer in model]
        assert torch.equal(plain(x), quantized(x))
        assert all(module.training for module in plain.modules())
        assert isinstance(quantized[0], ResidualConv)
        tied = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        tied[2].weight = tied[0].weight
        plain = rarefy.plain(residual(tied, codes=8))
        assert plain[0].weight is plain[2].weight
        assert plain[0].bias is not plain[2].bias

    def test_frozen_layers_stay_frozen_and_modes_are_kept(self) -> None:
        model = network().train()
        model[0].requires_grad_(False)
        quantized = residual(model, codes=8)
        assert isinstance(quantized[0], ResidualConv)
        assert [p.requires_grad for p in quantized.parameters()] == [False, False, True, True, True, True]
        assert all(module.training for module in quantized.modules())

    def test_what_does_not_fit_is_left_alone_with_its_reason(self) -> None:
        _, analysis = changed(network(), ResidualConfig(length=9, codes=31, stages=2))
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert [layer.name for layer in analysis.layers] == ["0"]
        assert "64 weights each, no multiple of `length`, 9" in reasons["3"]
        _, analysis = changed(network(), ResidualConfig(length=32, codes=8))
        assert "36 weights each, no multiple of `length`, 32" in analysis.skipped[0].reason
        _, analysis = changed(network(), ResidualConfig(length=4, codes=50))
        assert "it has 100 vectors of 4, and 2 stages of 50 codes store 100" in {s.reason for s in analysis.skipped}

    def test_a_weight_that_another_kind_of_layer_holds_is_left_alone(self) -> None:
        model = nn.ModuleDict({"embedding": nn.Embedding(30, 8), "head": nn.Linear(8, 30), "other": nn.Linear(8, 30)})
        model["head"].weight = model["embedding"].weight
        _, analysis = changed(model, ResidualConfig(codes=8))
        assert [layer.name for layer in analysis.layers] == ["other"]
        assert analysis.skipped[0].reason == "its weight is that of a layer which keeps no codes (Embedding)"

    def test_a_layer_without_weights_is_told(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(4, 0)
        _, analysis = changed(nn.Sequential(empty, nn.Linear(4, 40)), ResidualConfig(codes=8))
        assert [(layer.name, layer.reason) for layer in analysis.skipped] == [("0", "it has no weights")]

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        model = network()
        model[3].weight.data[0, 0] = math.nan
        with pytest.raises(StageError, match=r"'3'.*NaN or infinite"):
            residual(model)

    @pytest.mark.parametrize(
        ("options", "told"),
        [({"stages": 0}, "stages"), ({"codes": 1}, "codes"), ({"codes": 65537}, "codes"), ({"length": 5}, "length")],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            ResidualConfig(**options)
