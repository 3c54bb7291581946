"""What the tests of techniques that remove channels share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rarefy.nouns import implement
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy.technique import Analysis, Technique
from torch import nn

Make = Callable[..., Technique[Any]]
Prune = Callable[..., tuple[nn.Module, Analysis, Technique[Any]]]
MakeTask = Callable[..., ClassificationTask]


@pytest.fixture
def make() -> Make:
    """Return a function that makes `pruning/channel-NAME` with options."""

    def technique(name: str, **options: Any) -> Technique[Any]:
        step = {"technique": f"pruning/channel-{name}", **options}
        made: Technique[Any] = implement(load_recipe({"steps": [step]}).steps[0])
        return made

    return technique


@pytest.fixture
def prune(make: Make) -> Prune:
    """Return a function that prunes a model: what is left of it, the analysis, the technique."""

    def run(model: nn.Module, task: Any, name: str = "l1", **options: Any) -> tuple[nn.Module, Analysis, Any]:
        technique = make(name, **options)
        analysis = technique.analyze(model, task)
        compact = technique.transform(copy.deepcopy(model), analysis, task)
        return technique.consolidate(compact), analysis, technique

    return run


@pytest.fixture
def make_task() -> MakeTask:
    """Return a function that makes a task whose every split is exactly the given inputs and labels."""

    def make(x: torch.Tensor, y: torch.Tensor | None = None, batch_size: int = 16) -> ClassificationTask:
        y = torch.arange(len(x)) % 3 if y is None else y
        return ClassificationTask.from_arrays(x, y, validation=(x, y), test=(x, y), batch_size=batch_size)

    return make


@pytest.fixture
def perceptron() -> nn.Sequential:
    """Return a perceptron of 6 inputs, 8 hidden units and 3 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def blobs(make_task: MakeTask) -> ClassificationTask:
    """Return 40 samples for the perceptron."""
    generator = torch.Generator().manual_seed(1)
    return make_task(torch.randn(40, 6, generator=generator))
