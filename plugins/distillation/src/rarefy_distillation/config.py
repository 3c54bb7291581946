"""Options of distillation."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator
from rarefy_schemas import Finetune, NamedModel, ObjectiveConfig, TechniqueConfig, Traits

HINTON = "Hinton, Vinyals & Dean 2015, Distilling the knowledge in a neural network"


class LogitsConfig(ObjectiveConfig):
    """Match the teacher's softened class probabilities, mixed with the task's own loss."""

    implementation: ClassVar[str] = "rarefy_distillation.logits:Logits"
    paper: ClassVar[str] = HINTON
    needs_teacher: ClassVar[bool] = True

    objective: Literal["distillation/logits"] = "distillation/logits"
    temperature: float = Field(default=4.0, gt=0)
    """T, by which the logits of both networks are divided before the softmax."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the teacher's term; the rest goes to the task's loss, and at 1 no labels are needed."""

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Tell whether the task's own loss takes part."""
        return self.alpha < 1


class StudentConfig(TechniqueConfig):
    """Train another, smaller network to behave like the original."""

    implementation: ClassVar[str] = "rarefy_distillation.student:Student"
    paper: ClassVar[str] = HINTON
    traits: ClassVar[Traits] = Traits(
        data="teacher", start="scratch", changes_shapes=True, keeps_zeros=False, new_architecture=True
    )

    technique: Literal["distillation/logits"] = "distillation/logits"
    student: NamedModel
    """The network to train, such as `zoo:lenet300`."""
    allow_larger: bool = False
    """Accept a student with more parameters than the original."""

    @model_validator(mode="before")
    @classmethod
    def _learn_from_the_teacher(cls, data: Any) -> Any:
        """Fine-tune on the teacher's logits unless the recipe says otherwise."""
        training = data.get("finetune") if isinstance(data, dict) else None
        if not isinstance(data, dict) or isinstance(training, Finetune):
            return data
        training = training if isinstance(training, dict) else {"epochs": 10}
        objective = training.get("objective", {})
        if isinstance(objective, dict) and objective.get("objective", "distillation/logits") == "distillation/logits":
            # a wrong option is left for the recipe to report at its place
            with suppress(ValidationError):
                objective = LogitsConfig.model_validate(objective)
        return {**data, "finetune": {**training, "objective": objective}}
