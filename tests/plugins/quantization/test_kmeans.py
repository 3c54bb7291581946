"""Weight sharing by k-means: the clustering, the shared gradient, and what remains."""

from __future__ import annotations

import copy
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy_quantization.codes import Coded
from rarefy_quantization.config import KMeansConfig
from rarefy_quantization.kmeans import KMeans
from rarefy_quantization.lloyd import INITS, lloyd, nearest
from rarefy_quantization.sharing import TensorQuantizer
from torch import nn
from torch.nn.utils import parametrize

TASK: Any = None  # k-means needs no data


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=generator(seed)).sort().values


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))


def quantizer(**options: Any) -> KMeans:
    return KMeans(KMeansConfig(**options))


def transformed(model: nn.Module, **options: Any) -> tuple[KMeans, nn.Module]:
    technique = quantizer(**options)
    return technique, technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    technique, changed = transformed(model, **options)
    return technique.consolidate(changed)


def error(ordered: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((centroids[nearest(ordered, centroids)] - ordered).square().sum())


def optimum(ordered: torch.Tensor, count: int) -> float:
    """Return the least error over all ways to cut sorted values into `count` slices."""
    n = len(ordered)
    best = math.inf
    for cuts in combinations(range(1, n), count - 1):
        parts = torch.tensor_split(ordered, cuts)
        best = min(best, sum(float((part - part.mean()).square().sum()) for part in parts))
    return best


class TestLloyd:
    @pytest.mark.parametrize("init", INITS)
    @pytest.mark.parametrize("count", [1, 2, 7, 16, 64])
    def test_it_ends_at_a_fixed_point(self, init: str, count: int) -> None:
        ordered = values(3000)
        centroids = lloyd(ordered, INITS[init](ordered, count, generator()), 10_000)
        assert centroids.numel() == count
        distances = (ordered[:, None] - centroids).abs()
        codes = nearest(ordered, centroids)
        assert torch.equal(distances.gather(1, codes[:, None]).squeeze(1), distances.min(1).values)
        means = torch.stack([ordered[codes == j].mean() for j in range(count)])
        torch.testing.assert_close(centroids, means, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("seed", range(8))
    def test_it_finds_the_optimum_of_separated_groups(self, seed: int) -> None:
        noise = torch.randn(12, dtype=torch.float64, generator=generator(seed)) * 0.1
        ordered = (torch.tensor([-3.0, -1.0, 2.0, 5.0]).repeat_interleave(3) + noise).sort().values
        for init in ("linear", "density"):
            centroids = lloyd(ordered, INITS[init](ordered, 4, generator()), 100)
            assert error(ordered, centroids) == pytest.approx(optimum(ordered, 4))

    @pytest.mark.parametrize("seed", range(8))
    def test_the_best_of_many_random_starts_is_the_optimum(self, seed: int) -> None:
        ordered = values(11, seed)
        starts = [INITS["random"](ordered, 3, generator(s)) for s in range(40)]
        assert min(error(ordered, lloyd(ordered, start, 100)) for start in starts) == pytest.approx(optimum(ordered, 3))

    def test_more_rounds_never_raise_the_error(self) -> None:
        ordered = values(2000)
        for init, start_of in INITS.items():
            start = start_of(ordered, 16, generator())
            errors = [error(ordered, lloyd(ordered, start, rounds)) for rounds in (1, 2, 3, 5, 10, 50, 500)]
            assert errors == sorted(errors, reverse=True), init

    def test_lost_centroids_come_back(self) -> None:
        # evenly spread centroids between two far groups lose all values
        ordered = torch.cat([values(50) - 1000, values(50, 1) + 1000])
        centroids = lloyd(ordered, INITS["linear"](ordered, 8, generator()), 1000)
        assert nearest(ordered, centroids).bincount(minlength=8).min() > 0
        assert error(ordered, centroids) < 0.2 * float((ordered.abs() - 1000).square().sum())

    @pytest.mark.parametrize("copies", [3, 10, 100])
    def test_values_one_rounding_step_apart_are_told_apart(self, copies: int) -> None:
        low = torch.tensor([0.1], dtype=torch.float64)
        high = torch.nextafter(low, low + 1)
        ordered = torch.cat([low.repeat(copies), high.repeat(2)])
        centroids = lloyd(ordered, low + torch.tensor([5.0, 6.0], dtype=torch.float64), 100)
        torch.testing.assert_close(centroids, low.repeat(2), rtol=1e-14, atol=0)

    def test_repeated_values_do_not_break_it(self) -> None:
        ordered = torch.tensor([0.0] * 500 + [1.0] * 500 + [1.5, 2.0, 7.0, 7.25], dtype=torch.float64)
        for init, start_of in INITS.items():
            centroids = lloyd(ordered, start_of(ordered, 4, generator()), 1000)
            counts = nearest(ordered, centroids).bincount(minlength=4)
            assert counts.min() > 0, init
            assert error(ordered, centroids) < error(ordered, torch.tensor([0.5, 1.5, 2.0, 7.0])), init


class TestInits:
    def test_linear_is_even_from_the_least_to_the_greatest(self) -> None:
        ordered = torch.tensor([-1.0, 0.0, 0.1, 3.0], dtype=torch.float64)
        assert INITS["linear"](ordered, 5, generator()).tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0]

    def test_density_puts_as_many_values_around_each(self) -> None:
        ordered = torch.arange(12, dtype=torch.float64).exp()
        assert torch.equal(INITS["density"](ordered, 3, generator()), ordered[[2, 6, 10]])

    def test_random_picks_values_by_its_seed(self) -> None:
        ordered = values(100)
        one, again, other = (INITS["random"](ordered, 8, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert bool(torch.isin(one, ordered).all())


class TestCodes:
    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("zeros", [False, True])
    def test_a_tensor_takes_at_most_so_many_values_and_zero_stays(self, bits: int, zeros: bool) -> None:
        tensor = torch.randn(40, 50, generator=generator())
        if zeros:
            tensor[tensor.abs() < 0.8] = 0
        coded = quantizer().code(tensor, bits, seed=0)
        decoded = coded.decode()
        assert decoded.unique().numel() <= 2**bits
        assert coded.codebook.numel() == 2**bits
        assert coded.zeros is zeros
        assert torch.equal(decoded == 0, tensor == 0)
        assert decoded.dtype == tensor.dtype
        assert decoded.is_contiguous()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_are_kept(self, dtype: torch.dtype) -> None:
        tensor = torch.randn(500, generator=generator()).to(dtype)
        decoded = quantizer().code(tensor, 4, seed=0).decode()
        assert decoded.dtype == dtype
        assert decoded.unique().numel() <= 16
        assert float((decoded - tensor).double().square().mean()) < 0.02

    def test_few_values_are_kept_as_they_are(self) -> None:
        tensor = torch.tensor([0.0, -1.5, 0.25, 4.0, 0.25]).repeat(20)
        assert torch.equal(quantizer().code(tensor, 2, seed=0).decode(), tensor)

    def test_the_entropy_is_that_of_the_shares(self) -> None:
        codes = torch.tensor([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2, dtype=torch.uint8)
        assert Coded(codes, torch.arange(4.0), False).entropy() == pytest.approx(1.75)

    def test_non_contiguous_weights_are_quantized_in_place(self) -> None:
        model = nn.Sequential(nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last)
        after = quantized(model, bits=8)[0].weight
        assert after.is_contiguous()
        torch.testing.assert_close(after, model[0].weight, atol=2e-3, rtol=0, check_stride=False)


class TestModel:
    def test_the_layers_take_few_values_and_are_plain_again(self) -> None:
        model = network()
        technique, changed = transformed(model, bits=4)
        assert all(parametrize.is_parametrized(changed[i]) for i in (3, 5))
        changed = technique.consolidate(changed)
        assert [type(module) for module in changed] == [type(module) for module in model]
        assert changed.state_dict().keys() == model.state_dict().keys()
        assert all(changed[i].weight.unique().numel() == 16 for i in (0, 3, 5))
        assert all(isinstance(p, nn.Parameter) and p.is_contiguous() for p in changed.parameters())

    def test_bits_per_layer(self) -> None:
        changed = quantized(network(), bits=2, per_layer={"3": 6})
        assert [changed[i].weight.unique().numel() for i in (0, 3, 5)] == [4, 64, 4]

    def test_biases_on_demand(self) -> None:
        model = network()
        assert torch.equal(quantized(model, bits=2)[3].bias, model[3].bias)
        changed = quantized(model, bits=2, biases=True)
        assert [changed[i].bias.unique().numel() for i in (0, 3, 5)] == [4, 4, 4]

    def test_the_report_tells_the_error(self) -> None:
        model = network()
        before = copy.deepcopy(model.state_dict())
        analysis = quantizer(bits=3).analyze(model, TASK)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        after = quantized(model, bits=3)
        for layer in analysis.layers:
            old, new = (m.get_submodule(layer.name).weight.detach().double() for m in (model, after))
            assert layer.scores["distinct"] == 8
            assert layer.scores["bits"] == 3
            assert layer.scores["relative_mse"] == pytest.approx(float((old - new).square().sum() / old.square().sum()))
            assert 0 < layer.scores["relative_mse"] < 0.1
            shares = new.unique(return_counts=True)[1] / new.numel()
            assert layer.scores["entropy"] == pytest.approx(float(-(shares * shares.log2()).sum()), rel=1e-5)

    def test_layers_too_small_are_left_alone(self) -> None:
        model = network()
        analysis = quantizer(bits=8).analyze(model, TASK)
        assert [layer.name for layer in analysis.skipped] == ["0"]
        assert "72 weights that are not zero, and 8 bits make 256 codes" in analysis.skipped[0].reason
        assert torch.equal(quantized(model, bits=8)[0].weight, model[0].weight)

    def test_the_same_seed_gives_the_same_result(self) -> None:
        one, again = (quantized(network(), bits=4, init="random").state_dict() for _ in range(2))
        assert all(torch.equal(one[name], again[name]) for name in one)

    def test_parametrized_layers_can_be_copied(self) -> None:
        technique, changed = transformed(network(), bits=3)
        twin = copy.deepcopy(changed)
        images = torch.randn(2, 1, 8, 8)
        assert torch.equal(twin(images), changed(images))
        with torch.no_grad():
            twin[3].parametrizations.weight.original.add_(1)
        assert not torch.equal(twin[3].weight, changed[3].weight)
        assert torch.equal(technique.consolidate(changed)[3].weight, quantized(network(), bits=3)[3].weight)

    def test_tied_weights_have_one_codebook_and_stay_tied(self) -> None:
        model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False))
        model[2].weight = model[0].weight
        technique, changed = transformed(model, bits=3)
        lookups = [changed[i].parametrizations.weight.original for i in (0, 2)]
        assert lookups[0] is lookups[1]
        assert len(list(changed.parameters())) == len(list(model.parameters()))
        plain = technique.consolidate(copy.deepcopy(changed))
        assert plain[0].weight is plain[2].weight
        assert plain[0].weight.unique().numel() == 8

    def test_a_layer_in_two_places_is_quantized_once(self) -> None:
        layer = nn.Linear(16, 16)
        technique, changed = transformed(nn.Sequential(layer, nn.ReLU(), layer), bits=3)
        assert changed[0] is changed[2]
        changed = technique.consolidate(changed)
        assert changed[0] is changed[2]
        assert changed[0].weight.unique().numel() == 8

    def test_frozen_weights_stay_frozen(self) -> None:
        model = network()
        model[3].weight.requires_grad_(False)
        technique, changed = transformed(model, bits=3)
        assert not changed[3].parametrizations.weight.original.requires_grad
        changed = technique.consolidate(changed)
        assert [changed[i].weight.requires_grad for i in (0, 3, 5)] == [True, False, True]


class TestFineTuning:
    def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights(self) -> None:
        # dL/dC_k = sum_ij dL/dW_ij 1(I_ij = k), Deep Compression, eq. 3
        model = network()
        with torch.no_grad():
            model[3].weight[model[3].weight.abs() < 0.02] = 0
        technique, changed = transformed(model, bits=3)
        images, target = torch.randn(16, 1, 8, 8, generator=generator()), torch.arange(16) % 10
        nn.functional.cross_entropy(changed(images), target).backward()
        shared = changed[3].parametrizations.weight
        codes, gradient = shared[0].codes.clone(), shared.original.grad

        plain = technique.consolidate(changed)
        nn.functional.cross_entropy(plain(images), target).backward()
        by_hand = [float(plain[3].weight.grad[codes == k].double().sum()) for k in range(8)]
        assert gradient.numel() == 7  # code 0, the zeros, is no parameter
        torch.testing.assert_close(gradient, torch.tensor(by_hand[1:]), rtol=1e-4, atol=1e-6)

    def test_training_keeps_zeros_and_codes_and_mends_the_loss(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(data.target)

        def train(model: nn.Module, lr: float, steps: int) -> float:
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
            picks = generator()
            for _ in range(steps):
                batch = torch.randint(0, len(images), (128,), generator=picks)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            return loss(model)

        def loss(model: nn.Module) -> float:
            with torch.no_grad():
                return float(nn.functional.cross_entropy(model(images), labels))

        model = network()
        train(model, 5e-3, 80)
        with torch.no_grad():
            model[3].weight[model[3].weight.abs() < 0.03] = 0
        zeros = model[3].weight == 0
        technique, changed = transformed(model, bits=2)
        before = loss(changed)
        after = train(changed, 1e-3, 60)
        changed = technique.consolidate(changed)
        assert after < 0.8 * before
        assert loss(changed) == pytest.approx(after)
        assert torch.equal(changed[3].weight == 0, zeros)
        assert [changed[i].weight.unique().numel() for i in (0, 3, 5)] == [4, 4, 4]


def test_another_quantizer_is_a_few_lines() -> None:
    class Signs(TensorQuantizer[KMeansConfig]):
        """Mean magnitude times sign."""

        def quantize(self, values: torch.Tensor, importance: Any, count: int, generator: torch.Generator) -> Any:
            return (values > 0).long(), values.abs().mean() * torch.tensor([-1.0, 1.0])

    model = network()
    technique = Signs(KMeansConfig(bits=1))
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, TASK), TASK)
    plain = technique.consolidate(changed)
    for i in (0, 3, 5):
        weight = model[i].weight
        torch.testing.assert_close(plain[i].weight, weight.sign() * weight.abs().mean())


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"bits": 0}, "bits"),
            ({"bits": 9}, "bits"),
            ({"per_layer": {"3": 12}}, "per_layer.3"),
            ({"init": "kmeans++"}, "'linear', 'density' or 'random'"),
            ({"rounds": 0}, "rounds"),
            ({"codes": 16}, "codes"),
        ],
    )
    def test_options_that_cannot_work_are_refused(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(ValidationError, match=told):
            KMeansConfig(**options)

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(StageError, match=r"'fc\*'.*target layers are 0, 3, 5"):
            quantizer(per_layer={"fc*": 3}).analyze(network(), TASK)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_values_that_are_not_finite_are_refused(self, name: str) -> None:
        model = network()
        model[3].get_parameter(name).data.view(-1)[0] = math.nan
        with pytest.raises(StageError, match=r"'3'.*NaN or infinite"):
            quantizer(biases=True).analyze(model, TASK)

    def test_layers_without_weights_are_told(self) -> None:
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(4, 0)
        dead = nn.Linear(8, 8)
        nn.init.zeros_(dead.weight)
        model = nn.ModuleDict({"empty": empty, "dead": dead, "good": nn.Linear(8, 8)})
        analysis = quantizer(bits=2).analyze(model, TASK)
        assert [layer.name for layer in analysis.layers] == ["good"]
        assert {layer.name for layer in analysis.skipped} == {"empty", "dead"}
