"""Distillation of logits."""

from __future__ import annotations

from typing import Any

import torch
from rarefy.errors import StageError
from rarefy.objective import Objective
from rarefy.task import Task
from torch import nn
from torch.nn import functional as F

from rarefy_distillation.config import LogitsConfig


def softened_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over all but the last dimension.

    Logits are `(..., classes)`. The factor T^2 keeps the gradient's size as T grows (Hinton et al. 2015, section 2).
    """
    classes = student.shape[-1]
    p = F.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1)
    q = F.log_softmax(student.reshape(-1, classes) / temperature, dim=-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def check_logits(student: Any, teacher: Any) -> None:
    """Raise `StageError` unless both networks return one tensor of logits, of the same shape."""
    for network, outputs in (("student", student), ("original", teacher)):
        if not isinstance(outputs, torch.Tensor):
            raise StageError(
                f"the {network} returns a {type(outputs).__name__}, and distillation of logits needs one tensor "
                "`(..., classes)`; wrap the network so that it returns its logits alone"
            )
    if student.shape != teacher.shape:
        raise StageError(
            f"the student's outputs have the shape {tuple(student.shape)}, the original's {tuple(teacher.shape)}; "
            "give the student the same number of classes, in `student.options`"
        )


class Logits(Objective[LogitsConfig]):
    """(1 - alpha) of the task's loss and alpha of the divergence from the teacher."""

    def loss(self, model: nn.Module, teacher: nn.Module, batch: Any, task: Task) -> torch.Tensor:
        """Run both networks; labels are needed unless `alpha` is 1.

        Raises `StageError` when the outputs cannot be compared.
        """
        inputs, alpha = task.inputs(batch), self.config.alpha
        outputs = model(*inputs)
        if alpha == 0:
            return task.loss(outputs, batch)
        with torch.no_grad():
            targets = teacher(*inputs)
        check_logits(outputs, targets)
        divergence = softened_divergence(outputs, targets, self.config.temperature)
        return divergence if alpha == 1 else (1 - alpha) * task.loss(outputs, batch) + alpha * divergence
