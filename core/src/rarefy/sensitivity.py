"""How much worse a changed model does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.errors import StageError
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.task import Task


class Increase:
    """The increase of the mean loss over `model`'s on a few batches of the validation split.

    Without labels it is how far the outputs move on calibration inputs: `sum |y* - y|^2 / sum |y|^2`.
    """

    def __init__(self, model: nn.Module, task: Task, batches: int = 4) -> None:
        self.task, self.labelled = task, task.has_labels
        if self.labelled:
            self.batches: list[Any] = list(itertools.islice(task.loader("validation"), batches))
        else:
            self.batches = list(task.calibration(batches=batches))
        if not self.batches:
            raise StageError("the task gives no batches to measure sensitivity on; give it validation data")
        self.loss = self._loss(model) if self.labelled else 0.0
        self.outputs = [] if self.labelled else list(self._outputs(model))

    def __call__(self, changed: nn.Module) -> float:
        """Return the increase of a model of the same outputs; below zero when it does better."""
        return self._loss(changed) - self.loss if self.labelled else self._moved(changed)

    def _loss(self, model: nn.Module) -> float:
        total, samples = 0.0, 0
        with evaluation(model), torch.no_grad():
            for batch in self.batches:
                size = len(self.task.labels(batch))
                outputs = model(*move(self.task.inputs(batch), device_of(model)))
                total += size * float(self.task.loss(outputs, batch))
                samples += size
        return total / samples

    def _outputs(self, model: nn.Module) -> Iterator[torch.Tensor]:
        with evaluation(model), torch.no_grad():
            for batch in self.batches:
                for leaf in tree_leaves(model(*move(batch, device_of(model)))):
                    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                        yield leaf.float()

    def _moved(self, changed: nn.Module) -> float:
        pairs = list(zip(self.outputs, self._outputs(changed), strict=True))
        moved = sum(float((after - before).square().sum()) for before, after in pairs)
        return moved / max(sum(float(before.square().sum()) for before, _ in pairs), 1e-30)
