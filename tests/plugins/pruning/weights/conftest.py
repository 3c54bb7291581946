"""What the tests of criteria for single weights share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.tasks import ClassificationTask
from rarefy.technique import Technique
from rarefy.training import fit
from rarefy_pruning.weights.config import WeightPruning
from torch import nn

MakeTask = Callable[[torch.Tensor, torch.Tensor], ClassificationTask]
Compress = Callable[[nn.Module, WeightPruning, Any], nn.Module]


@pytest.fixture
def make_task() -> MakeTask:
    """Return a function that makes a task whose training split is exactly the given inputs and labels."""

    def make(x: torch.Tensor, y: torch.Tensor) -> ClassificationTask:
        return ClassificationTask.from_arrays(x, y, validation=(x, y), test=(x, y), batch_size=48)

    return make


@pytest.fixture
def blobs(make_task: MakeTask) -> ClassificationTask:
    """Return 192 samples of 6 inputs with different scales, and 3 classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, 6, generator=generator) * torch.arange(1, 7) / 3
    return make_task(x, (x @ torch.randn(6, 3, generator=generator)).argmax(1))


@pytest.fixture
def model() -> nn.Module:
    """Return a network for the 6 inputs and 3 classes, with 144 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def compress() -> Compress:
    """Return a function that does what the pipeline does for one step."""

    def run(model: nn.Module, config: WeightPruning, task: Any) -> nn.Module:
        technique: Technique[Any] = implement(config)
        changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
        if config.finetune is not None:
            fit(changed, model, task, config.finetune, rules_for(technique, changed))
        return technique.consolidate(changed)

    return run
