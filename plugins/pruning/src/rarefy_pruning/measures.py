"""What criteria measure on unlabelled data: norms of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rarefy.calibration import stream_inputs
from rarefy.gradients import add_
from rarefy.hessian import unfold
from rarefy.task import Task
from rarefy.weights import LayerWeight
from torch import nn


def input_norms(model: nn.Module, weights: Sequence[LayerWeight], task: Task, batches: int) -> dict[str, torch.Tensor]:
    """Return the L2 norm of what each weight is multiplied with, over all samples and positions.

    Of the shape of the weight; that of a convolution follows its stride, padding, dilation and groups.
    """
    squares: dict[str, torch.Tensor] = {}

    def visit(name: str, layer: nn.Module) -> Any:
        def add(inputs: torch.Tensor) -> None:
            x = inputs.float().square()
            # unfolding is linear, so the samples may be added up before it
            x = x.sum(0) if x.dim() >= layer.weight.dim() else x
            add_(squares, name, unfold(layer, x).sum(1))

        return add

    visits = {weight.name: visit(weight.name, weight.layer) for weight in weights}
    stream_inputs(model, task.calibration(batches=batches), visits, "measuring inputs", batches)
    return {w.name: _as_weight(squares[w.name].sqrt(), w.parameter) for w in weights if w.name in squares}


def _as_weight(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Repeat `(groups, columns)` for each output of a group, in the shape of the weight."""
    return rows.repeat_interleave(len(weight) // len(rows), 0).view(weight.shape)
