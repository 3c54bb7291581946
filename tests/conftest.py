"""Fixtures that all tests share: a task on real digits, and a network trained on it."""

from __future__ import annotations

import copy

import pytest
import torch
from rarefy.tasks import ClassificationTask
from rarefy.tasks.data import digits
from rarefy.training import fit
from rarefy.zoo import digits_cnn
from rarefy_schemas import Finetune
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits_task() -> ClassificationTask:
    return digits()


@pytest.fixture(scope="session")
def trained_once(digits_task: ClassificationTask) -> nn.Module:
    torch.manual_seed(0)
    model = digits_cnn()
    fit(model, model, digits_task, Finetune(epochs=6, lr=3e-3))
    return model.eval()


@pytest.fixture
def trained_digits(trained_once: nn.Module) -> nn.Module:
    return copy.deepcopy(trained_once)
