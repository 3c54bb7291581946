"""Distillation: the loss against hand-computed values, and a student that learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.pipeline import run
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy_distillation.config import LogitsConfig, StudentConfig
from rarefy_distillation.logits import softened_divergence
from torch import nn


def test_the_divergence_of_a_case_worked_out_by_hand() -> None:
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    # at T = 2 the teacher says (3/4, 1/4), the student (1/2, 1/2)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(softened_divergence(student, teacher, 2.0)) == pytest.approx(4 * by_hand)
    # the mean over samples, not over classes
    assert float(softened_divergence(student.repeat(5, 1), teacher.repeat(5, 1), 2.0)) == pytest.approx(4 * by_hand)


def test_equal_logits_do_not_diverge_and_sequences_count_each_position() -> None:
    logits = torch.randn(3, 4, 7)
    assert float(softened_divergence(logits, logits + 5, 3.0)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(3, 4, 7)
    flat = softened_divergence(logits.reshape(12, 7), other.reshape(12, 7), 3.0)
    assert torch.allclose(softened_divergence(logits, other, 3.0), flat)


def test_the_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    """For T -> infinity the gradient tends to (student - teacher) / classes, for logits of mean zero."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 5, generator=generator) for _ in range(2))
    teacher, student = teacher - teacher.mean(), (student - student.mean()).requires_grad_()
    softened_divergence(student, teacher, 1000.0).backward()
    assert torch.allclose(student.grad, (student - teacher).detach() / 5, atol=1e-3)


def objective_loss(task: ClassificationTask, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    batch = next(iter(task.loader("train")))
    loss = implement(LogitsConfig(alpha=alpha, temperature=2)).loss(student, teacher, batch, task)
    outputs = student(*task.inputs(batch))
    return loss, task.loss(outputs, batch), softened_divergence(outputs, teacher(*task.inputs(batch)), 2)


def test_alpha_mixes_the_two_losses(digits_task: ClassificationTask) -> None:
    loss, own, divergence = objective_loss(digits_task, 0.25)
    assert torch.allclose(loss, 0.75 * own + 0.25 * divergence)
    loss, own, _ = objective_loss(digits_task, 0)
    assert torch.equal(loss, own)


def test_labels_are_not_needed_when_the_teacher_is_all() -> None:
    task = ClassificationTask.from_arrays(torch.randn(40, 1, 8, 8), None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batch = next(iter(task.loader("train")))
    assert torch.isfinite(implement(LogitsConfig(alpha=1)).loss(model, model, batch, task))


def test_a_student_learns_and_its_file_is_its_own(
    trained_digits: nn.Module, digits_task: ClassificationTask, tmp_path: Path
) -> None:
    step: dict[str, Any] = {
        "technique": "distillation/logits",
        "student": {"source": "zoo:mlp", "options": {"width": 32, "depth": 1}},
        "finetune": {"epochs": 12, "lr": 0.01},
    }
    recipe = load_recipe({"steps": [step], "evaluate": {"batch_sizes": []}})
    assert recipe.steps[0].finetune.objective == LogitsConfig()  # type: ignore[union-attr]
    result = run(recipe, tmp_path / "run", model=trained_digits, task=digits_task)
    assert digits_task.score(result.model, "test") > 0.88
    assert result.report.steps[0].value("parameters") == 64 * 32 + 32 + 32 * 10 + 10
    import rarefy

    loaded = rarefy.load(tmp_path / "run" / "exports" / "model.rarefy")
    assert torch.equal(loaded(*digits_task.example_inputs(3)), result.model(*digits_task.example_inputs(3)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.classes(x.flatten(1)), x


def test_outputs_that_do_not_compare(digits_task: ClassificationTask) -> None:
    batch = next(iter(digits_task.loader("train")))
    objective = implement(LogitsConfig())
    ten, one = (nn.Sequential(nn.Flatten(), nn.Linear(64, n)) for n in (10, 1))
    # a single class would broadcast against ten without a word
    with pytest.raises(StageError, match=r"shape \(64, 1\), the original's \(64, 10\)"):
        objective.loss(one, ten, batch, digits_task)
    with pytest.raises(StageError, match="the student returns a tuple"):
        objective.loss(Named(), ten, batch, digits_task)


def test_comparing_a_student_leaves_the_statistics_of_the_original(digits_task: ClassificationTask) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10)).train()
    before = model[1].running_mean.clone()
    config = StudentConfig(student={"source": "zoo:mlp", "options": {"width": 8}})  # type: ignore[arg-type]
    implement(config).analyze(model, digits_task)
    assert torch.equal(model[1].running_mean, before)
    assert model[1].training


def test_students_that_do_not_fit(trained_digits: nn.Module, digits_task: ClassificationTask) -> None:
    large = StudentConfig(student={"source": "zoo:mlp", "options": {"width": 4096}})  # type: ignore[arg-type]
    with pytest.raises(StageError, match="set `allow_larger: true`"):
        implement(large).analyze(trained_digits, digits_task)
    other = StudentConfig(student={"source": "zoo:mlp", "options": {"num_classes": 7, "width": 8}})  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"shape \(2, 7\)"):
        implement(other).analyze(trained_digits, digits_task)
    small = StudentConfig(student={"source": "zoo:mlp", "options": {"size": 5, "width": 8}})  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"does not run on the task's inputs of shape \[\(2, 1, 8, 8\)\]"):
        implement(small).analyze(trained_digits, digits_task)
    with pytest.raises(StageError, match="the original returns a tuple"):
        implement(other).analyze(Named(), digits_task)
    with pytest.raises(ValidationError, match="student"):
        StudentConfig()  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="temperature"):
        LogitsConfig(temperature=0)
