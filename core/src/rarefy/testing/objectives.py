"""Rules that every objective keeps."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from rarefy_schemas import ObjectiveConfig
from torch import nn

from rarefy.nouns import implement
from rarefy.objective import Objective
from rarefy.task import Task
from rarefy.testing.nouns import NounConformance
from rarefy.testing.require import require
from rarefy.testing.subjects import GuardedTask, differences


class ObjectiveConformance(NounConformance):
    """Rules for an objective; subclass it with a `config`."""

    config: ObjectiveConfig
    parent = Objective

    def test_the_loss_teaches_the_model_alone(self) -> None:
        """Check that the loss is a finite scalar whose gradient reaches the model and not the teacher."""
        model, teacher = self.model().train(), self._teacher()
        before = copy.deepcopy(teacher)
        loss = self._loss(model, teacher)
        require(
            loss.shape == () and bool(torch.isfinite(loss)),
            f"The loss is {loss.detach()}, not one finite number",
            "return the mean over the batch as a scalar",
        )
        require(loss.requires_grad, "The loss does not depend on the model", "do not detach the model's outputs")
        loss.backward()  # type: ignore[no-untyped-call]
        require(
            any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()),
            "No gradient reaches the model",
            "do not detach the model's outputs",
        )
        require(
            all(p.grad is None for p in teacher.parameters()) and not differences(before, teacher),
            "The teacher gets gradients or changes",
            "run the teacher under torch.no_grad(), in the mode that it is in",
        )

    def test_the_teacher_is_asked_only_when_declared(self) -> None:
        """Check `needs_teacher`."""
        if not self.config.needs_teacher:
            self._loss(self.model(), _Absent())

    def test_labels_are_used_only_when_declared(self) -> None:
        """Check `needs_labels`."""
        data = "labelled" if self.config.needs_labels else "unlabelled"
        self._loss(self.model(), self._teacher(), cast(Task, GuardedTask(self.task(), data)))

    def _teacher(self) -> nn.Module:
        teacher = self.model()
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.1)
        return teacher.eval()

    def _loss(self, model: nn.Module, teacher: nn.Module, task: Task | None = None) -> torch.Tensor:
        objective: Objective[Any] = implement(self._noun())
        batch = next(iter(self.task().loader("train")))
        return objective.loss(model, teacher, batch, task or self.task())


class _Absent(nn.Module):
    def forward(self, *inputs: Any) -> Any:
        require(False, "The objective runs the teacher", "set `needs_teacher: ClassVar[bool] = True` in its config")
