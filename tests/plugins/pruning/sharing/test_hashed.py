"""Hashed layers: the same values everywhere, the published gradient, and files as small as they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rarefy
import torch
from pydantic import ValidationError
from rarefy import artifact
from rarefy.errors import ArtifactError, StageError
from rarefy.measure.work import flops
from rarefy.modules import Base, build, describe
from rarefy.tasks import ClassificationTask
from rarefy.testing import TechniqueConformance
from rarefy.training import fit
from rarefy_pruning.sharing.config import HashedConfig
from rarefy_pruning.sharing.hashed import Hashed
from rarefy_pruning.sharing.hashing import signed_buckets, splitmix64
from rarefy_pruning.sharing.layers import HashedConv2d, HashedLayer, HashedLinear
from rarefy_schemas import Finetune
from torch import nn
from torch.nn.utils import prune as torch_prune

TASK: Any = None  # hashing needs no data


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


def hash_(model: nn.Module, seed: int = 0, **options: Any) -> nn.Module:
    """Hash without fine-tuning, as the pipeline would."""
    technique = Hashed(HashedConfig(**options))
    technique.seed = seed
    return technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)


def signs_and_buckets(layer: HashedLayer) -> tuple[np.ndarray, np.ndarray]:
    table = signed_buckets(int(np.prod(layer.shape)), layer.buckets, layer.seed).reshape(layer.shape)
    return np.where(table < layer.buckets, 1.0, -1.0), table % layer.buckets


class TestProjection(TechniqueConformance):
    config = HashedConfig(compression=4, init="projection")


class TestFresh(TechniqueConformance):
    config = HashedConfig(compression=2, per_layer={"hidden": 16}, init="fresh", finetune={"epochs": 1})


class TestHash:
    def test_it_is_the_published_generator(self) -> None:
        # reference values of SplitMix64 for this seed
        expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
        assert splitmix64(1234567, 0, 4).tolist() == expected
        assert splitmix64(1234567, 2, 2).tolist() == expected[2:]

    def test_python_integers_give_the_same(self) -> None:
        mask = 2**64 - 1
        for n, found in enumerate(signed_buckets(50, 7, seed=2**31 - 1).tolist()):
            z = (2**31 - 1 + (n + 1) * 0x9E3779B97F4A7C15) & mask
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            z ^= z >> 31
            assert found == ((z >> 32) * 7 >> 32) + 7 * (z & 1)

    def test_it_never_changes(self) -> None:
        # files hold the seed alone, so other buckets would make every file written so far worthless
        assert signed_buckets(12, 5, seed=3).tolist() == [5, 8, 8, 5, 1, 8, 0, 4, 2, 4, 3, 8]

    def test_pieces_of_a_large_weight_fit_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = signed_buckets(1000, 30, seed=1)
        monkeypatch.setattr("rarefy_pruning.sharing.hashing._CHUNK", 64)
        assert np.array_equal(signed_buckets(1000, 30, seed=1), whole)

    def test_buckets_and_signs_are_even_and_independent(self) -> None:
        table = signed_buckets(200_000, 50, seed=11)
        counts = np.bincount(table, minlength=100)
        # chi-squared of 100 equally likely cells: mean 99, standard deviation 14
        assert 99 - 5 * 14 < float(((counts - 2000) ** 2 / 2000).sum()) < 99 + 5 * 14

    def test_seeds_give_unrelated_tables(self) -> None:
        one, other = signed_buckets(100_000, 10, seed=1), signed_buckets(100_000, 10, seed=2)
        assert float((one == other).mean()) == pytest.approx(1 / 20, abs=0.005)


class TestLayers:
    def test_a_linear_layer_is_its_virtual_weight(self) -> None:
        layer = HashedLinear(5, 3, buckets=4, seed=9)
        sign, bucket = signs_and_buckets(layer)
        virtual = torch.tensor(sign, dtype=torch.float32) * layer.values[torch.tensor(bucket)]
        x = torch.randn(2, 7, 5)
        assert torch.equal(layer.weight, virtual)
        assert torch.allclose(layer(x), x @ virtual.T + layer.bias)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": (2, 1), "padding": (1, 2), "bias": False},
            {"padding": "same", "dilation": (1, 2), "groups": 2},
            {"padding": "valid", "padding_mode": "reflect"},
            {"padding": (1, 2), "padding_mode": "circular", "stride": (1, 2)},
            {"padding": "same", "padding_mode": "replicate", "dilation": (2, 1)},
        ],
    )
    def test_a_convolution_is_that_of_its_virtual_weight(self, options: dict[str, Any]) -> None:
        layer = HashedConv2d(4, 6, (3, 2), 11, 5, **options)
        dense = nn.Conv2d(4, 6, (3, 2), **options)
        with torch.no_grad():
            dense.weight.copy_(layer.weight)
            if layer.bias is not None and dense.bias is not None:
                dense.bias.copy_(layer.bias)
        x = torch.randn(2, 4, 9, 8)
        assert torch.allclose(layer(x), dense(x), atol=1e-6)

    @pytest.mark.parametrize("layer", [HashedLinear(6, 5, 7, 3), HashedConv2d(2, 3, (3, 3), 7, 3, padding=(1, 1))])
    def test_the_gradient_of_a_value_is_the_signed_sum_over_its_bucket(self, layer: HashedLayer) -> None:
        # Chen et al. 2015: dL/dw_k = sum of xi(i, j) dL/dV_ij over h(i, j) = k
        convolution = isinstance(layer, HashedConv2d)
        dense = nn.Conv2d(2, 3, 3, padding=1) if convolution else nn.Linear(6, 5)
        dense.weight = nn.Parameter(layer.weight.detach().clone())
        dense.bias = layer.bias
        x = torch.randn(4, 2, 5, 5) if convolution else torch.randn(4, 6)
        layer.zero_grad()
        layer(x).square().sum().backward()
        dense(x).square().sum().backward()
        assert dense.weight.grad is not None
        sign, bucket = signs_and_buckets(layer)
        by_hand = np.zeros(7)
        np.add.at(by_hand, bucket.ravel(), (sign * dense.weight.grad.numpy()).ravel())
        assert layer.values.grad is not None
        assert np.allclose(layer.values.grad.numpy(), by_hand, rtol=1e-5, atol=1e-5)

    def test_the_projection_is_least_squares(self) -> None:
        layer, weight = HashedLinear(9, 8, buckets=10, seed=1), torch.randn(8, 9)
        error = layer.project_(weight)
        sign, bucket = signs_and_buckets(layer)
        design = np.zeros((72, 10))
        design[np.arange(72), bucket.ravel()] = sign.ravel()
        target = weight.double().numpy().ravel()
        best, *_ = np.linalg.lstsq(design, target, rcond=None)
        assert np.allclose(layer.values.detach().numpy(), best, atol=1e-6)
        assert error == pytest.approx(np.linalg.norm(design @ best - target) / np.linalg.norm(target), rel=1e-5)

    def test_a_weight_that_is_hashed_already_comes_back(self) -> None:
        layer, other = HashedLinear(30, 20, 40, seed=6), HashedLinear(30, 20, 40, seed=6)
        assert other.project_(layer.weight) < 1e-6
        assert torch.allclose(other.weight, layer.weight)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_work(self, dtype: torch.dtype) -> None:
        layer = HashedLinear(8, 4, 6, 1, dtype=dtype)
        assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype

    def test_fresh_values_have_the_scale_of_the_full_layer(self) -> None:
        # Glorot-like scales divide by the fan-in of the weight, 400, whatever the number of values
        torch.manual_seed(0)
        layer = HashedLinear(400, 300, buckets=100, seed=2)
        assert float(layer.values.detach().abs().max()) <= 1 / 20
        assert float(layer.weight.detach().std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.15)

    def test_all_devices_agree_that_nothing_is_looked_up_without_values(self) -> None:
        with torch.device("meta"):
            layer = HashedConv2d(4, 8, (3, 3), 20, 1)
        assert layer(torch.empty(1, 4, 5, 5, device="meta")).shape == (1, 8, 3, 3)
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        twin = HashedConv2d(4, 8, (3, 3), 20, 1)
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(layer.weight, twin.weight)

    def test_the_transformer_fast_path_still_runs(self) -> None:
        # torch reads `linear1.weight` of the layer there
        encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        hashed = hash_(nn.Sequential(encoder), compression=2)
        assert isinstance(hashed[0].linear1, HashedLinear)
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            fast = hashed(x)
        assert torch.allclose(fast, hashed(x), atol=1e-5)

    @pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
    def test_plain_layers_compute_the_same(self, padding_mode: str) -> None:
        layer = HashedConv2d(
            4, 6, (3, 3), 20, 1, stride=(2, 1), padding=(1, 2), groups=2, padding_mode=padding_mode, bias=False
        )
        model = nn.Sequential(layer, nn.Flatten(), HashedLinear(6 * 4 * 10, 5, 7, 3)).eval()
        x, plain = torch.randn(2, 4, 8, 8), rarefy.plain(model)
        assert [type(layer) for layer in plain] == [nn.Conv2d, nn.Flatten, nn.Linear]
        assert torch.equal(plain(x), model(x))
        assert not any(module.training for module in plain.modules())
        assert torch.equal(rarefy.plain(layer)(x), layer(x))
        one, other = HashedLinear(4, 4, 3, 1), HashedLinear(4, 4, 3, 2)
        other.values = one.values
        plain = rarefy.plain(nn.Sequential(one, other))
        assert not torch.equal(plain[0].weight, plain[1].weight)

    def test_a_layer_that_was_never_run_can_be_exported(self) -> None:
        layer, x = HashedLinear(6, 5, 7, 3), torch.randn(2, 6)
        exported = torch.export.export(layer, (x,))
        assert torch.equal(exported.module()(x), layer(x))


class TestFile:
    def test_it_holds_the_values_and_little_else(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 256, bias=False))
        hashed = hash_(model, compression=16, init="fresh").eval()
        path, x = tmp_path / "model.rarefy", torch.randn(3, 3, 8, 8)
        artifact.write(hashed, Base(lambda: copy.deepcopy(model)), path)
        values = round(64 * 75 / 16) + 64 + 64 * 16 * 256 // 16
        assert sum(p.numel() for p in hashed.parameters()) == values
        assert 2.5 * values < path.stat().st_size < 4 * values + 3000
        loaded = artifact.load(path, base=lambda: copy.deepcopy(model))
        assert torch.equal(loaded(x), hashed(x))

    def test_a_used_layer_stores_no_more(self) -> None:
        model = network()
        base, hashed = Base(lambda: network()), hash_(model)
        before = artifact.encoded_size(hashed, base)
        hashed(torch.randn(2, 64))
        assert artifact.encoded_size(hashed, base) == before
        assert set(hashed.state_dict()) == {"0.values", "0.bias", "2.values", "2.bias"}

    def test_arguments_that_cannot_be_are_refused(self) -> None:
        model = network()
        spec = describe(hash_(model), Base(lambda: network()))
        root = spec.root
        assert root is not None
        children = dict(root.children)
        children["0"] = children["0"].model_copy(update={"arguments": {**children["0"].arguments, "buckets": 0}})
        bad = spec.model_copy(update={"root": root.model_copy(update={"children": children})})
        with pytest.raises(ArtifactError, match="stores from 1 to"):
            build(bad)


class TestTechnique:
    def test_rates_are_kept_and_per_layer_goes_first(self) -> None:
        hashed = hash_(network(), compression=10, per_layer={"2": 4})
        assert [hashed[0].buckets, hashed[2].buckets] == [1280, 500]

    def test_each_layer_has_its_seed_and_it_follows_from_that_of_the_step(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        one, again, other = hash_(model), hash_(model), hash_(model, seed=1)
        assert one[0].seed != one[1].seed
        assert [layer.seed for layer in again] == [layer.seed for layer in one]
        assert one[0].seed != other[0].seed

    def test_the_report_tells_error_and_storage_and_that_work_stays(self) -> None:
        model = network()
        technique = Hashed(HashedConfig(compression=2, init="projection"))
        first = technique.analyze(model, TASK).layers[0]
        assert "FLOPs and time stay" in first.action
        assert first.scores["parameters_before"] == 64 * 200 + 200
        assert first.scores["parameters_after"] == 6400 + 200
        # a bucket stays empty with probability (1 - 1/K)^(2K), about exp(-2)
        assert first.scores["unused_values"] == pytest.approx(6400 * np.exp(-2), rel=0.1)
        hashed, x = hash_(model, compression=2, init="projection"), (torch.randn(1, 64),)
        error = torch.linalg.norm(hashed[0].weight - model[0].weight) / torch.linalg.norm(model[0].weight)
        assert first.scores["relative_error"] == pytest.approx(float(error.detach()), rel=1e-5)
        assert flops(hashed, x) == flops(model, x)

    def test_frozen_layers_stay_frozen(self) -> None:
        model = network()
        model[0].requires_grad_(False)
        for init in ("projection", "fresh"):
            hashed = hash_(model, init=init)
            assert [p.requires_grad for p in hashed.parameters()] == [False, False, True, True]

    def test_the_global_generator_is_left_alone(self) -> None:
        model = network()
        before = torch.random.get_rng_state()
        hash_(model, init="fresh")
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_what_would_not_shrink_or_is_tied_is_told(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
                self.head.weight = self.embedding.weight
                self.tiny, self.good = nn.Linear(1, 2), nn.Linear(8, 8)
                self.masked = torch_prune.identity(nn.Linear(4, 4), "weight")

        model = Tied()
        analysis = Hashed(HashedConfig(compression=1.2)).analyze(model, TASK)
        assert [layer.name for layer in analysis.layers] == ["good"]
        reasons = {layer.name: layer.reason for layer in analysis.skipped}
        assert "another layer (Embedding)" in reasons["head"]
        assert "2 stored values for its 2 weights would save nothing" in reasons["tiny"]
        assert "computed from other tensors" in reasons["masked"]

    def test_a_layer_without_weights_is_told(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(4, 0)
        analysis = Hashed(HashedConfig()).analyze(nn.Sequential(empty, nn.Linear(4, 4)), TASK)
        assert [(layer.name, layer.reason) for layer in analysis.skipped] == [("0", "it has no weights")]

    def test_a_layer_used_twice_is_replaced_in_both_places(self) -> None:
        shared = nn.Linear(8, 8)
        hashed = hash_(nn.Sequential(shared, nn.ReLU(), shared))
        assert hashed[0] is hashed[2]
        assert isinstance(hashed[0], HashedLinear)

    def test_it_learns_more_than_a_small_network_of_as_many_parameters(self, digits_task: ClassificationTask) -> None:
        # the claim of the paper, here at a share of 1/64
        scores = []
        hashed = hash_(network(), compression=64)
        small = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
        for model in (nn.Sequential(nn.Flatten(), hashed), nn.Sequential(nn.Flatten(), small)):
            fit(model, model, digits_task, Finetune(epochs=15, lr=1e-2))
            scores.append(digits_task.score(model, "validation"))
        assert sum(p.numel() for p in hashed.parameters()) < sum(p.numel() for p in small.parameters())
        assert scores[0] > max(0.85, scores[1] + 0.02)


class TestBadInput:
    @pytest.mark.parametrize("rate", [0, 0.5, 1, -2, float("nan"), float("inf")])
    def test_rates_that_compress_nothing_are_refused(self, rate: float) -> None:
        with pytest.raises(ValidationError, match="compression"):
            HashedConfig(compression=rate)
        with pytest.raises(ValidationError, match="per_layer"):
            HashedConfig(per_layer={"0": rate})

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, value: float) -> None:
        model = network()
        with torch.no_grad():
            model[2].weight[0, 0] = value
        with pytest.raises(StageError, match=r"'2'.*NaN or infinite"):
            Hashed(HashedConfig()).analyze(model, TASK)

    def test_patterns_and_targets_that_match_nothing_are_refused(self) -> None:
        with pytest.raises(StageError, match=r"'conv\*'.*target layers are 0, 2"):
            Hashed(HashedConfig(per_layer={"conv*": 2})).analyze(network(), TASK)
        with pytest.raises(StageError, match="no layer matches"):
            Hashed(HashedConfig(targets={"include": ["none"]})).analyze(network(), TASK)

    @pytest.mark.parametrize("buckets", [0, -1, 2**30])
    def test_a_layer_refuses_a_number_of_values_that_cannot_be(self, buckets: int) -> None:
        with pytest.raises(StageError, match=f"not {buckets}"):
            HashedLinear(2, 2, buckets, 0)
