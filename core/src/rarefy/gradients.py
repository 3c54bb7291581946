"""Gradients of the loss on training batches, and what everything that differentiates it needs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rarefy.measure.mode import device_of, evaluation, move
from rarefy.progress import track
from rarefy.task import Task
from rarefy.weights import LayerWeight


def gradients(model: nn.Module, weights: Sequence[LayerWeight], task: Task, batches: int) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss, mean over the samples of some batches, for each layer that has one."""
    parameters = [weight.parameter for weight in weights]
    found: dict[str, torch.Tensor] = {}
    with differentiable(model, parameters):
        for share, batch in labelled(task, batches):
            loss = loss_of(model, task, batch)
            each = torch.autograd.grad(loss, parameters, allow_unused=True)
            for weight, gradient in zip(weights, each, strict=True):
                if gradient is not None:
                    add_(found, weight.name, gradient.float() * share)
    return found


def labelled(task: Task, batches: int) -> Iterator[tuple[float, Any]]:
    """Yield the first batches of the training split in a fixed random order, each with its share of their samples."""
    chosen = list(itertools.islice(task.loader("train", shuffle=True, seed=0), batches))
    sizes = [len(task.labels(batch)) for batch in chosen]
    for size, batch in zip(sizes, track(chosen, "measuring on batches", total=len(chosen)), strict=True):
        yield size / sum(sizes), batch


def loss_of(model: nn.Module, task: Task, batch: Any) -> torch.Tensor:
    """Return the mean loss of a batch."""
    return task.loss(model(*move(task.inputs(batch), device_of(model))), batch)


@contextlib.contextmanager
def differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put a model into evaluation mode, and let frozen parameters have gradients."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    with evaluation(model), torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def add_(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    """Add a value to the sum of that name in place."""
    sums[name] = sums[name] + value if name in sums else value
