"""Inputs of a model and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import TensorDataset

from rarefy.errors import RecipeError
from rarefy.task import Task
from rarefy.tasks.classification import ClassificationTask


@dataclass(frozen=True)
class InputsTask(ClassificationTask):
    """Positional inputs of a model, without labels: enough for every technique and format that needs none.

    All splits are the same samples, and there is no score (NaN).
    """

    has_labels: bool = False
    metric: str = "score"

    @classmethod
    def of(cls, *inputs: torch.Tensor, batch_size: int = 64) -> InputsTask:
        """Make a task of one tensor per positional argument of the model, first dimension samples.

        Raises `RecipeError` when one has no samples, another number of them than the others, or a value that is NaN or
        infinite.
        """
        if not inputs:
            raise RecipeError("give at least one tensor of inputs")
        for number, tensor in enumerate(inputs):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or len(tensor) == 0:
                what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise RecipeError(f"input {number} has to be a tensor whose first dimension are samples, not {what}")
            if len(tensor) != len(inputs[0]):
                raise RecipeError(f"input {number} has {len(tensor)} samples, and the first input {len(inputs[0])}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise RecipeError(f"input {number} has values that are NaN or infinite")
        data = TensorDataset(*(tensor.detach() for tensor in inputs))
        return cls({"train": data, "validation": data, "test": data}, batch_size)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the model's arguments."""
        return tuple(batch)


def as_task(data: Any) -> Task:
    """Return a task as it is, and inputs, a tensor or several in a tuple or list, as `InputsTask`."""
    if isinstance(data, torch.Tensor):
        return InputsTask.of(data)
    if isinstance(data, tuple | list):
        return InputsTask.of(*data)
    if isinstance(data, Task):
        return data
    raise RecipeError(
        f"data has to be a rarefy.Task, or inputs of the model: a tensor or a tuple of tensors whose first dimension "
        f"are samples, not {type(data).__name__}"
    )
