"""What the kit tries things on, and how it looks at models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.task import Task
from rarefy.tasks import ClassificationTask

_DATA = {
    "none": ("loader", "calibration", "labels", "loss", "score"),
    "unlabelled": ("labels", "loss", "score"),
}


def small_model() -> nn.Module:
    """Return a network of 12,000 parameters for images `(2, 8, 8)` and 4 classes, the same at every call.

    It has plain, strided and grouped convolutions, batch norm with statistics that matter, and linear layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            OrderedDict(
                stem=nn.Conv2d(2, 8, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(8),
                act1=nn.ReLU(),
                grouped=nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
                act2=nn.ReLU(),
                wide=nn.Conv2d(16, 32, 3, padding=1),
                act3=nn.ReLU(),
                pool=nn.AvgPool2d(2),
                flatten=nn.Flatten(),
                hidden=nn.Linear(128, 48),
                act4=nn.ReLU(),
                classes=nn.Linear(48, 4),
            )
        )
        for _ in range(3):
            model(torch.randn(32, 2, 8, 8) + 0.5)
    return model.eval()


def small_task() -> Task:
    """Return a classification of 64 random images `(2, 8, 8)` into 4 classes, the same at every call."""
    generator = np.random.default_rng(0)
    images = generator.normal(0.5, 1.0, size=(64, 2, 8, 8)).astype(np.float32)
    labels = generator.integers(0, 4, size=64)
    return ClassificationTask.from_arrays(images, labels, batch_size=16)


class GuardedTask:
    """A task that gives no more data than a technique or an objective says it needs."""

    def __init__(self, task: Task, data: str) -> None:
        self.task, self.data = task, data

    def __getattr__(self, name: str) -> Any:
        if name in _DATA.get(self.data, ()):
            raise AssertionError(
                f"It uses `task.{name}`, which it says it does not need.\n  To mend it: declare the data it needs "
                "(`Traits(data=...)` of a technique, `needs_labels` of an objective), or do without."
            )
        return getattr(self.task, name)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, detached."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of at least two dimensions by name, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.dim() > 1}


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that are not the same to the last bit."""
    ours, theirs = tensors(one), tensors(other)
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {name for name in both if not _same(ours[name], theirs[name])})


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def outputs(model: nn.Module, task: Task) -> list[torch.Tensor]:
    """Return the tensors among the outputs of `model` in evaluation mode on four example inputs."""
    was_training = model.training
    with torch.no_grad():
        found = tree_leaves(model.eval()(*task.example_inputs(4)))
    model.train(was_training)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


def scaffolding(model: nn.Module) -> list[str]:
    """Return the modules that carry parametrizations or hooks, with what they carry."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = []
    for name, module in model.named_modules():
        found += [f"{name or 'the model'}: {kind.strip('_')}" for kind in kinds if getattr(module, kind)]
        found += [f"{name or 'the model'}: parametrizations"] if "parametrizations" in module._modules else []
    return found


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of parameters and buffers by name."""
    return {name: tensor.shape for name, tensor in tensors(model).items()}


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def zero_count(model: nn.Module) -> int:
    """Return the number of zeros among the weights."""
    return sum(int((weight == 0).sum()) for weight in weights(model).values())


class Inputs:
    """As much of a task as a technique needs that looks at calibration inputs: batches of one tensor, nothing else."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        self.batches = inputs

    def calibration(self, batch_size: int | None = None, batches: int = 8) -> Iterator[tuple[torch.Tensor]]:
        """Yield the first of the batches; their size is what it is."""
        return ((x,) for x in self.batches[:batches])
