"""Criteria that look at data: what they measure, what they keep, and that they only read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.gradients import gradients
from rarefy.tasks import ClassificationTask
from rarefy.weights import layer_weights
from rarefy_pruning.measures import input_norms
from rarefy_pruning.weights.config import MagnitudeConfig, MovementConfig, SnipConfig, WandaConfig, WeightPruning
from rarefy_pruning.weights.movement import Movement
from rarefy_pruning.weights.snip import Snip
from rarefy_pruning.weights.wanda import Wanda
from torch import nn
from torch.nn import functional as F

ALL = MagnitudeConfig(amount=0.5)


def zeros(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight.detach() == 0 for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


class TestWanda:
    def test_the_score_is_that_of_the_paper(self, model: nn.Module, blobs: ClassificationTask) -> None:
        technique = Wanda(WandaConfig(amount=0.5, batches=2))
        weights, _ = layer_weights(model, ALL)
        measured = technique.measure(model, weights, blobs)
        x = torch.cat([inputs[0] for inputs in blobs.calibration(batches=2)])
        for layer, seen in ((0, x), (2, model[:2](x))):
            weight = model[layer].weight.detach()
            score = technique.score(weight, measured[str(layer)])
            torch.testing.assert_close(score, weight.abs() * seen.detach().norm(dim=0))

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(4, 6, 3),
            nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2),
            nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular", groups=4),
        ],
        ids=["plain", "strided, dilated, grouped", "depthwise, circular"],
    )
    def test_a_convolution_weighs_what_each_place_of_its_kernel_sees(self, layer: nn.Conv2d, make_task: Any) -> None:
        torch.manual_seed(0)
        x = torch.randn(20, 4, 7, 8)
        model = nn.Sequential(layer)
        found = input_norms(model, layer_weights(model, ALL)[0], make_task(x, torch.zeros(20).long()), 9)["0"]
        # where one weight is one and all others are zero, the outputs are the inputs of that weight
        for index in [(0, 0, 0, 0), (3, 0, 1, 1), (layer.out_channels - 1, layer.weight.shape[1] - 1, 2, 0)]:
            one = torch.zeros_like(layer.weight)
            one[index] = 1
            y = torch.func.functional_call(layer, {"weight": one, "bias": torch.zeros(layer.out_channels)}, x)
            torch.testing.assert_close(found[index], y[:, index[0]].detach().norm())

    def test_equal_norms_make_it_magnitude(self, compress: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 5))
        signs = (torch.randint(0, 2, (64, 8)) * 2 - 1).float()
        task = make_task(signs, torch.zeros(64).long())
        wanda = compress(model, WandaConfig(amount=0.5), task)
        magnitude = compress(model, MagnitudeConfig(amount=0.5, scope="row"), task)
        assert torch.equal(wanda[0].weight, magnitude[0].weight)
        assert (wanda[0].weight == 0).sum(1).tolist() == [4] * 5

    def test_a_large_input_saves_a_small_weight(self, compress: Any, make_task: Any) -> None:
        model = nn.Sequential(nn.Linear(2, 3))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0.2], [1.0, 0.05], [0.3, 0.2]]))
        task = make_task(torch.tensor([[1.0, 10.0]] * 20), torch.zeros(20).long())
        pruned = compress(model, WandaConfig(amount=0.5), task)
        assert (pruned[0].weight != 0).tolist() == [[False, True], [True, False], [False, True]]

    def test_a_gradual_schedule_measures_anew(self, model: nn.Module, blobs: ClassificationTask, compress: Any) -> None:
        config = WandaConfig(amount=0.5, schedule="cubic", updates=3, finetune={"epochs": 2})
        assert [m.sum(1).tolist() for m in zeros(compress(model, config, blobs))] == [[3] * 16, [8] * 3]


class TestSnip:
    def test_the_score_is_the_slope_of_the_loss_in_a_factor_of_the_weight(
        self, model: nn.Module, blobs: ClassificationTask
    ) -> None:
        model = model.double()
        x, y = (tensor for tensor in next(iter(blobs.loader("train", batch_size=192))))
        task = _Doubles(blobs)
        technique = Snip(SnipConfig(amount=0.5, batches=4))
        measured = technique.measure(model, layer_weights(model, ALL)[0], task)
        for layer in (0, 2):
            weight = model[layer].weight
            score = technique.score(weight.detach(), measured[str(layer)])
            for index in [(0, 0), (1, 3), (2, 5)]:
                value, h, losses = weight.detach()[index].item(), 1e-4, []
                for factor in (1 + h, 1 - h):
                    with torch.no_grad():
                        weight[index] = value * factor
                        losses.append(float(F.cross_entropy(model(x.double()), y)))
                        weight[index] = value
                expected = abs(losses[0] - losses[1]) / (2 * h)
                assert float(score[index]) == pytest.approx(expected, rel=1e-4, abs=1e-9)

    def test_frozen_weights_are_measured_and_stay_frozen(self, model: nn.Module, blobs: ClassificationTask) -> None:
        free = gradients(model, layer_weights(model, ALL)[0], blobs, 2)
        model.requires_grad_(False)
        frozen = gradients(model, layer_weights(model, ALL)[0], blobs, 2)
        assert all(torch.equal(free[name], frozen[name]) for name in ("0", "2"))
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    def test_an_input_that_is_always_zero_loses_its_weights_first(self, compress: Any, make_task: Any) -> None:
        torch.manual_seed(0)
        x = torch.randn(96, 6)
        x[:, [1, 4]] = 0
        pruned = compress(nn.Sequential(nn.Linear(6, 3)), SnipConfig(amount=1 / 3), make_task(x, torch.arange(96) % 3))
        assert (pruned[0].weight == 0).all(0).tolist() == [False, True, False, False, True, False]


class _Doubles:
    """A task in double precision."""

    def __init__(self, task: ClassificationTask) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        return (batch[0].double(),)


class TestMovement:
    def test_what_grows_stays_and_what_shrinks_goes_though_it_is_larger(self, compress: Any) -> None:
        # the loss is (w - target)^2, so each weight moves to its target and stays on its side of zero
        model = nn.Sequential(nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[0.3, 1.0]]))
        finetune = {"epochs": 1, "optimizer": "sgd", "momentum": 0, "lr": 0.02, "schedule": "constant"}
        config = MovementConfig(amount=0.5, schedule="at-end", finetune=finetune)
        task = _Regression(torch.tensor([[0.9, 0.6]]))
        movement = compress(model, config, task)
        assert (movement[0].weight != 0).tolist() == [[True, False]]
        trained = compress(model, MagnitudeConfig(amount=0.01, finetune=finetune), task)[0].weight
        assert 0.3 < trained[0, 0] < trained[0, 1] < 1
        assert (compress(model, MagnitudeConfig(amount=0.5), task)[0].weight != 0).tolist() == [[False, True]]

    def test_the_score_is_summed_before_each_step(self) -> None:
        technique = Movement(MovementConfig(amount=0.5, finetune={}))
        steps = [(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.5]])), (torch.ones(1, 2), torch.ones(1, 2))]
        for weight, gradient in steps:
            technique.observe("0", weight, gradient)
        technique.observe("0", torch.ones(1, 2), torch.tensor([[1.0, torch.inf]]))
        assert technique.measure(nn.Module(), [], None)["0"].tolist() == [[-1.5, 0.0]]  # type: ignore[arg-type]

    def test_the_count_is_exact(self, model: nn.Module, blobs: ClassificationTask, compress: Any) -> None:
        for options in ({}, {"schedule": "at-end"}, {"ramp": 1.0, "updates": 2}):
            pruned = compress(model, MovementConfig(amount=0.75, finetune={"epochs": 3}, **options), blobs)
            assert [int(mask.sum()) for mask in zeros(pruned)] == [72, 36]

    def test_it_needs_fine_tuning(self) -> None:
        with pytest.raises(ValidationError, match="give `finetune`"):
            MovementConfig(amount=0.5)
        with pytest.raises(ValidationError, match="'cubic' or 'at-end'"):
            MovementConfig(amount=0.5, schedule="one-shot", finetune={})


class _Regression:
    """A task that pulls a linear layer to given weights; its batches are nothing but the identity."""

    metric, higher_is_better, has_labels = "loss", False, True

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def loader(self, split: str, batch_size: int | None = None, *, shuffle: bool = False, seed: int = 0) -> Any:
        from torch.utils.data import DataLoader

        return DataLoader([torch.eye(2)] * 10, batch_size=None)  # type: ignore[arg-type]

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        return (batch,)

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs - self.target.T).square().sum()

    def score(self, model: nn.Module, split: str) -> float:
        return 0.0


class TestBadData:
    @pytest.mark.parametrize("config", [WandaConfig(amount=0.5), SnipConfig(amount=0.5)])
    def test_a_layer_that_takes_no_part_is_named(self, config: WeightPruning, blobs: ClassificationTask) -> None:
        from rarefy.nouns import implement

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(x)  # type: ignore[no-any-return]

        with pytest.raises(StageError, match=r"'unused' takes no part.*targets\.exclude"):
            implement(config).analyze(Net(), blobs)

    @pytest.mark.parametrize("config", [WandaConfig(amount=0.5), SnipConfig(amount=0.5)])
    def test_a_model_that_overflows_is_told(
        self, config: WeightPruning, model: nn.Module, blobs: ClassificationTask
    ) -> None:
        from rarefy.nouns import implement

        broken = nn.Sequential(_Overflow(), model)
        with pytest.raises(StageError, match="NaN or infinite"):
            implement(config).analyze(broken, blobs)


class _Overflow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.inf


def test_measuring_in_half_precision_does_not_overflow(model: nn.Module, make_task: Any) -> None:
    x = torch.full((32, 6), 300.0, dtype=torch.bfloat16)
    half = model.to(torch.bfloat16)
    norms = input_norms(half, layer_weights(half, ALL)[0], make_task(x, torch.zeros(32).long()), 8)
    assert norms["0"].dtype == torch.float32
    assert float(norms["0"][0, 0]) == pytest.approx(300 * 32**0.5, rel=1e-2)
