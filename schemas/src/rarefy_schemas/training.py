"""Fine-tuning: what is minimised, for how long, and how."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from rarefy_schemas.base import Noun, Schema


class ObjectiveConfig(Noun):
    """Options of an objective, the loss that fine-tuning minimises."""

    noun: ClassVar[str] = "objective"
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False


class TaskLoss(ObjectiveConfig):
    """The task's own loss."""

    implementation: ClassVar[str] = "rarefy.objective:TaskObjective"
    needs_labels: ClassVar[bool] = True
    objective: Literal["task"] = "task"


class Augment(Schema):
    """Random changes of images, other ones in each epoch."""

    shift: int = Field(default=0, ge=0)
    """Most pixels that an image is moved, up or down and left or right; zeros move in."""
    flip: bool = False
    """Whether one image in two, by chance, is mirrored left to right."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.shift and not self.flip:
            raise ValueError("give `shift`, a number of pixels, or `flip: true`")
        return self


class Finetune(Schema):
    """One fine-tuning: objective, length and optimizer."""

    epochs: int = Field(default=1, ge=0)
    """Passes over the training split."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per optimizer step and process; the task's own when absent."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam, AdamW, whose weight decay stays out of the gradient, or gradient descent with momentum."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate at the start."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls, to zero at the end unless constant."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate first rises from zero."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimizer."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest gradient norm."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of the engine."""
    memory_format: Literal["keep", "channels_last"] = "keep"
    """How images and kernels lie in memory during the training: as they do, or channels last, with which convolutions
    are often faster and results differ by rounding. Afterwards kernels are contiguous."""
    augment: Augment | None = None
    """Random changes of images `(samples, channels, height, width)` with one label each; none when absent."""
    keep: Literal["last", "best"] = "last"
    """Weights to keep: of the last epoch, or of the best one on the validation split."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without gain on the validation split."""
    objective: SerializeAsAny[ObjectiveConfig] = TaskLoss()
    """What is minimised: the task's own loss, or another objective with its options, such as `distillation/logits`."""
