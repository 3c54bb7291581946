"""The fine-tuning loop: seeded, guarded, under rules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rarefy.errors import StageError
from rarefy.rules import KeepZeros
from rarefy.tasks import ClassificationTask
from rarefy.technique import TrainingRule
from rarefy.training import _rate, fit
from rarefy_schemas import Finetune
from torch import nn


@pytest.fixture
def task() -> ClassificationTask:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return ClassificationTask.from_arrays(x[:80], y[:80], validation=(x[80:100], y[80:100]), test=(x[100:], y[100:]))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def test_training_learns_and_tells_each_epoch(model: nn.Module, task: ClassificationTask) -> None:
    trained = fit(model, model, task, Finetune(epochs=15, lr=0.02, batch_size=20))
    assert [row["epoch"] for row in trained.history] == list(range(1, 16))
    assert trained.history[-1]["loss"] < trained.history[0]["loss"] / 2
    assert trained.history[-1]["validation"] >= 0.9
    assert trained.model is model


def test_one_seed_one_result(model: nn.Module, task: ClassificationTask) -> None:
    results = []
    for seed in (1, 1, 2):
        copy_ = copy.deepcopy(model)
        fit(copy_, model, task, Finetune(epochs=2, batch_size=16), seed=seed)
        results.append(copy_[0].weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_mode_of_model_and_teacher_is_restored_and_no_gradient_stays(
    model: nn.Module, task: ClassificationTask
) -> None:
    model.eval()
    teacher = copy.deepcopy(model).train()
    fit(model, teacher, task, Finetune(epochs=1))
    assert not model.training
    assert teacher.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_stops_with_advice(model: nn.Module, task: ClassificationTask) -> None:
    with torch.no_grad():
        model[0].weight.fill_(math.inf)
    with pytest.raises(StageError, match=r"became (nan|inf) at step 1 .* lower `lr` \(now 0\.5\)"):
        fit(model, model, task, Finetune(lr=0.5))


def test_frozen_parameters_stay_and_no_epochs_do_nothing(model: nn.Module, task: ClassificationTask) -> None:
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert fit(model, model, task, Finetune(epochs=0)).history == ()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fit(model, model, task, Finetune(epochs=1))
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["2.weight"], model[2].weight)


def test_rules_add_a_penalty_and_act_after_each_step(model: nn.Module, task: ClassificationTask) -> None:
    seen: list[float] = []

    class Rule(TrainingRule):
        def penalty(self, model: nn.Module) -> torch.Tensor:
            return 10 * sum(p.square().sum() for p in model.parameters())

        def after_step(self, model: nn.Module, progress: float) -> None:
            seen.append(progress)

    norm = sum(float(p.detach().square().sum()) for p in model.parameters())
    fit(model, model, task, Finetune(epochs=3, lr=0.05, batch_size=20), rules=[Rule()])
    assert seen == pytest.approx([(i + 1) / 12 for i in range(12)])
    assert sum(float(p.detach().square().sum()) for p in model.parameters()) < norm / 2


def test_rules_are_told_the_learning_rate_of_the_step_taken(model: nn.Module, task: ClassificationTask) -> None:
    class Watch(TrainingRule):
        def __init__(self) -> None:
            self.rates: list[float | None] = []

        def after_step(self, model: nn.Module, progress: float) -> None:
            self.rates.append(self.lr)

    watch = Watch()
    fit(model, model, task, Finetune(epochs=1, lr=0.4, batch_size=20, schedule="linear"), rules=[watch])
    assert watch.rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_rules_see_the_gradients_that_the_step_follows(
    model: nn.Module, task: ClassificationTask, clip_norm: float | None
) -> None:
    class Descent(TrainingRule):
        """Foretells the step of plain gradient descent."""

        def before_step(self, model: nn.Module) -> None:
            self.expected = [p.detach() - 0.1 * p.grad for p in model.parameters() if p.grad is not None]

        def after_step(self, model: nn.Module, progress: float) -> None:
            parameters = list(model.parameters())
            assert len(self.expected) == len(parameters)
            for parameter, expected in zip(parameters, self.expected, strict=True):
                torch.testing.assert_close(parameter.detach(), expected)

    plain = Finetune(epochs=1, optimizer="sgd", momentum=0, lr=0.1, schedule="constant", clip_norm=clip_norm)
    before = copy.deepcopy(model)
    fit(model, model, task, plain, rules=[Descent()])
    assert not torch.equal(before[0].weight, model[0].weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_zeros_stay_zero_under_momentum_and_decay(model: nn.Module, task: ClassificationTask, optimizer: str) -> None:
    with torch.no_grad():
        model[0].weight[::2] = 0
    fit(
        model,
        model,
        task,
        Finetune(epochs=3, lr=0.05, optimizer=optimizer, weight_decay=0.01),
        rules=[KeepZeros(model)],
    )
    assert (model[0].weight[::2] == 0).all()
    assert (model[0].weight[1::2] != 0).all()


def test_the_best_epoch_is_kept_and_patience_stops(model: nn.Module, task: ClassificationTask) -> None:
    trained = fit(model, model, task, Finetune(epochs=40, lr=0.02, keep="best", patience=2, batch_size=20))
    scores = [row["validation"] for row in trained.history]
    assert task.score(model, "validation") == max(scores)
    assert len(scores) < 40
    assert scores.index(max(scores)) == len(scores) - 3


def test_max_steps_bounds_the_training(model: nn.Module, task: ClassificationTask) -> None:
    steps: list[float] = []

    class Count(TrainingRule):
        def after_step(self, model: nn.Module, progress: float) -> None:
            steps.append(progress)

    fit(model, model, task, Finetune(epochs=9, max_steps=7, batch_size=20), rules=[Count()])
    assert len(steps) == 7
    assert steps[-1] == 1


def test_learning_rate_schedules() -> None:
    cosine = Finetune(schedule="cosine", warmup=0.2)
    rates = [_rate(step, 10, cosine) for step in range(11)]
    assert rates[0] == pytest.approx(1 / 3)
    assert rates[2] == 1
    assert rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0)
    assert [_rate(s, 4, Finetune(schedule="linear")) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert {_rate(s, 4, Finetune(schedule="constant")) for s in range(5)} == {1.0}


def test_precision_can_change_from_one_training_to_the_next(model: nn.Module, task: ClassificationTask) -> None:
    for precision in ("bf16", "no", "bf16"):
        trained = fit(copy.deepcopy(model), model, task, Finetune(precision=precision))
        assert "forward" not in vars(trained.model)
        assert math.isfinite(trained.history[-1]["loss"])


@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_that_the_processor_emulates_is_told(
    model: nn.Module,
    task: ClassificationTask,
    fast: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    for precision in ("no", "bf16"):
        fit(copy.deepcopy(model), model, task, Finetune(precision=precision, max_steps=1))
    told = [record.message for record in caplog.records if "fast instructions for bf16" in record.message]
    assert len(told) == (0 if fast else 1)


def test_channels_last_changes_results_by_rounding_only() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 4
    task = ClassificationTask.from_arrays(x, y, validation=(x, y), test=(x, y))
    kernels = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    start = nn.Sequential(*kernels, nn.Linear(64, 4))
    plain, last, seen = copy.deepcopy(start), copy.deepcopy(start), []
    last[3].register_forward_hook(lambda *args: seen.append(args[2].is_contiguous(memory_format=torch.channels_last)))
    config = Finetune(epochs=2, optimizer="sgd")
    fit(plain, start, task, config)
    fit(last, start, task, config.model_copy(update={"memory_format": "channels_last"}))
    assert seen[:2] == [True, True]
    for one, other in zip(plain.parameters(), last.parameters(), strict=True):
        assert other.is_contiguous()
        assert torch.allclose(one, other, atol=1e-5)
    assert all(parameter.is_contiguous() for parameter in start.parameters())
