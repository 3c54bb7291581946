"""Optimal Brain Damage: true second derivatives, against the whole Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rarefy.curvature import second_derivatives
from rarefy.errors import StageError
from rarefy.tasks import ClassificationTask
from rarefy.weights import layer_weights
from rarefy_pruning.weights.brain_damage import OptimalBrainDamage
from rarefy_pruning.weights.config import MagnitudeConfig, OptimalBrainDamageConfig
from torch import nn
from torch.nn import functional as F

ALL = MagnitudeConfig(amount=0.5)


def whole(model: nn.Module, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of the Hessian in a weight, taken out of the whole matrix."""
    weight = model.get_parameter(name)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(model, {name: value}, x), y)

    hessian = torch.autograd.functional.hessian(loss, weight.detach())
    assert isinstance(hessian, torch.Tensor)
    return hessian.reshape(weight.numel(), -1).diagonal().view_as(weight)


def data(task: ClassificationTask) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = next(iter(task.loader("train", batch_size=1000)))
    return x, y


def images(make_task: Any) -> ClassificationTask:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 2, 5, 5, generator=generator)
    task: ClassificationTask = make_task(x, torch.randint(0, 3, (96,), generator=generator))
    return task


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Sees the six inputs as three tokens of two numbers, in one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.out = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.each(x.view(-1, 3, 2))).prod(1))  # type: ignore[no-any-return]


class TestExact:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_linear_layers(self, inplace: bool, blobs: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(inplace), nn.Linear(4, 3))
        # 16 products are fewer than the weights of each layer, and as many as exactness in its outputs needs
        found = second_derivatives(model, layer_weights(model, ALL)[0], blobs, 4, 5)
        for layer in ("0", "2", "4"):
            torch.testing.assert_close(found[layer], whole(model, f"{layer}.weight", *data(blobs)))

    @pytest.mark.parametrize("kind", [Tied, Tokens])
    def test_weights_that_are_used_several_times(self, kind: type[nn.Module], blobs: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = kind()
        weights, _ = layer_weights(model, ALL)
        found = second_derivatives(model, weights, blobs, 4, 100)
        for weight in weights:
            torch.testing.assert_close(found[weight.name], whole(model, f"{weight.name}.weight", *data(blobs)))

    def test_convolutions(self, make_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
        task = images(make_task)
        found = second_derivatives(model, layer_weights(model, ALL)[0], task, 2, 72)
        for layer in ("0", "3"):
            torch.testing.assert_close(found[layer], whole(model, f"{layer}.weight", *data(task)))

    def test_it_is_not_the_squared_gradient(self, model: nn.Module, blobs: ClassificationTask) -> None:
        found = second_derivatives(model, layer_weights(model, ALL)[0], blobs, 4, 100)["2"]
        x, y = data(blobs)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), model[2].weight)
        assert bool((found > 5 * gradient.square()).any())

    def test_one_linear_layer_by_hand(self, make_task: Any) -> None:
        # logits (w x, 0): with p = sigmoid(w x), d2L/dw^2 = p (1 - p) x^2 per sample
        model = nn.Sequential(nn.Linear(1, 2, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[0.7], [0.0]]))
        x = torch.tensor([[1.0], [2.0], [-3.0]])
        task = make_task(x, torch.tensor([0, 1, 0]))
        weights, _ = layer_weights(model, ALL)
        p = torch.sigmoid(0.7 * x)
        expected = float((p * (1 - p) * x.square()).mean())
        found = second_derivatives(model, weights, task, 8, 2)["0"]
        assert found.flatten().tolist() == pytest.approx([expected, expected])
        technique = OptimalBrainDamage(OptimalBrainDamageConfig(amount=0.5))
        assert technique.score(model[0].weight, found).tolist()[0][0] == pytest.approx(expected * 0.49 / 2)


class TestEstimate:
    def test_it_comes_near_the_truth_as_probes_grow(self, make_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
        task = images(make_task)
        weights = [weight for weight in layer_weights(model, ALL)[0] if weight.name == "0"]
        truth = whole(model, "0.weight", *data(task))
        errors = [
            float((second_derivatives(model, weights, task, 2, probes)["0"] - truth).norm() / truth.norm())
            for probes in (1, 64)
        ]
        assert errors[1] < 0.3 < errors[0]
        assert errors[1] < errors[0] / 4

    def test_through_the_outputs_of_a_linear_layer(self, blobs: ClassificationTask) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 3))
        weights, _ = layer_weights(model, ALL)
        truth = whole(model, "0.weight", *data(blobs))
        found = second_derivatives(model, weights, blobs, 4, 40)["0"]
        assert float((found - truth).norm() / truth.norm()) < 0.2

    def test_the_seed_decides(self, model: nn.Module, blobs: ClassificationTask) -> None:
        weights, _ = layer_weights(model, ALL)
        one, again, other = (second_derivatives(model, weights, blobs, 1, 2, seed)["0"] for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


class TestPruning:
    def test_a_large_weight_on_a_dead_input_goes_first(self, compress: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        x = torch.randn(96, 4)
        x[:, 2] = 0
        model = nn.Sequential(nn.Linear(4, 3))
        with torch.no_grad():
            model[0].weight[:, 2] = 9
        pruned = compress(model, OptimalBrainDamageConfig(amount=0.25), make_task(x, torch.arange(96) % 3))
        assert (pruned[0].weight == 0).all(0).tolist() == [False, False, True, False]

    def test_at_a_minimum_it_loses_less_than_magnitude(
        self, model: nn.Module, blobs: ClassificationTask, compress: Any
    ) -> None:
        from rarefy.training import fit
        from rarefy_schemas import Finetune

        # inputs of different scales make equal weights differ in worth
        fit(model, model, blobs, Finetune(epochs=60, lr=0.02, weight_decay=1e-3))
        x, y = data(blobs)
        damage, magnitude = (
            F.cross_entropy(compress(model, kind(amount=0.4), blobs)(x), y).item()
            for kind in (OptimalBrainDamageConfig, MagnitudeConfig)
        )
        assert damage < magnitude

    def test_attention_is_differentiated_twice(self, make_task: Any) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                q = self.query(x)
                return self.out(F.scaled_dot_product_attention(q, x, x).mean(1))  # type: ignore[no-any-return]

        torch.manual_seed(0)
        task = make_task(torch.randn(24, 5, 4), torch.arange(24) % 3)
        model = Attention()
        found = second_derivatives(model, layer_weights(model, ALL)[0], task, 1, 16)
        x, y = data(task)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.testing.assert_close(found["query"], whole(model, "query.weight", x, y))

    def test_what_has_no_second_derivative_is_told(self, blobs: ClassificationTask) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * 1

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
                return g * 1

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.two(Once.apply(self.one(x)))  # type: ignore[no-any-return, no-untyped-call]

        technique = OptimalBrainDamage(OptimalBrainDamageConfig(amount=0.5))
        with pytest.raises(StageError, match=r"differentiated twice in 'one'.*targets\.exclude"):
            technique.analyze(Net(), blobs)
