"""What fine-tuning minimises."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from rarefy_schemas import ObjectiveConfig, TaskLoss
from torch import nn

from rarefy.task import Task

ConfigT = TypeVar("ConfigT", bound=ObjectiveConfig)


class Objective(Generic[ConfigT]):
    """A loss over a batch; it may look at a teacher."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Task) -> torch.Tensor:
        """Run `model` on `batch` and return the scalar mean loss."""
        raise NotImplementedError


class TaskObjective(Objective[TaskLoss]):
    """The task's own loss."""

    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Task) -> torch.Tensor:
        """Return `task.loss` of the model's outputs."""
        return task.loss(model(*task.inputs(batch)), batch)
