"""A smaller network instead of a changed one."""

from __future__ import annotations

from typing import Any

import torch
from rarefy.errors import StageError
from rarefy.measure import parameters
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.references import build_model
from rarefy.task import Task
from rarefy.technique import Analysis, Technique
from rarefy_schemas import LayerReport, ModelReference
from torch import nn

from rarefy_distillation.config import StudentConfig
from rarefy_distillation.logits import check_logits


class Student(Technique[StudentConfig]):
    """Builds the student; fine-tuning does the rest."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Compare sizes and outputs; raise `StageError` when the student does not fit."""
        student = self._build()
        before, after = parameters(model), parameters(student)
        if after > before and not self.config.allow_larger:
            raise StageError(
                f"the student {self.config.student.source!r} has {after:,} parameters, the original {before:,}; "
                "choose a smaller one, or set `allow_larger: true`"
            )
        self._compare(student, model, task.example_inputs(2))
        report = LayerReport(
            name=self.config.student.source,
            kind=type(student).__name__,
            action=f"train a student of {after:,} parameters in place of {before:,}",
            scores={"parameters_before": before, "parameters_after": after},
        )
        return Analysis((report,))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Return the untrained student."""
        return self._build()

    def new_reference(self) -> ModelReference:
        """Return how the student is built."""
        return self.config.student

    def predict(self, model: nn.Module) -> nn.Module:
        """Return the student without values."""
        with torch.device("meta"):
            return self._build()

    @torch.no_grad()
    def _compare(self, student: nn.Module, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        with evaluation(student, model):
            given = model(*move(inputs, device_of(model)))
            try:
                made = student(*move(inputs, device_of(student)))
            except RuntimeError as error:
                shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]
                raise StageError(
                    f"the student {self.config.student.source!r} does not run on the task's inputs of shape {shapes}: "
                    f"{error}. Give it the right size in `student.options`"
                ) from error
        check_logits(made, given)

    def _build(self) -> nn.Module:
        return build_model(self.config.student, load_weights=True, seed=self.seed)
