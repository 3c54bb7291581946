"""Training under a sum of norms: where it settles, and what dies."""

from __future__ import annotations

import math

import pytest
import torch
from rarefy.errors import StageError
from rarefy.tasks import ClassificationTask
from rarefy.training import fit
from rarefy_pruning.sparsity.rules import NormPenalty, ProximalSteps, training_rule
from rarefy_pruning.sparsity.slices import Slices, Structures
from rarefy_schemas import Finetune
from torch import nn

TARGET = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])
"""Rows of norm 5, 0.5 and 10."""


class Point(nn.Module):
    """A weight whose loss is half its squared distance from `TARGET`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2))

    def loss(self) -> torch.Tensor:
        return 0.5 * (self.weight - TARGET).square().sum()


ROWS = [Structures("rows", (Slices("weight", (0,), torch.arange(3)[:, None]),))]


def minimum(strength: float) -> torch.Tensor:
    """Return argmin loss + strength * sum of row norms: each row of the target, shrunk."""
    return TARGET * (1 - strength / TARGET.norm(dim=1, keepdim=True)).clamp(min=0)


@pytest.mark.parametrize("options", [
    {"optimizer": "sgd", "momentum": 0.0}, {"optimizer": "sgd", "momentum": 0.9},
])  # fmt: skip
def test_gradient_descent_settles_at_the_minimum_of_loss_and_penalty(options: dict[str, object]) -> None:
    model, config = Point(), Finetune(lr=0.05, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    rule = ProximalSteps(ROWS, model, 1.0, config)
    rule.lr = config.lr
    for _ in range(600):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        rule.after_step(model, 0.5)
    assert torch.allclose(model.weight, minimum(1.0), atol=1e-4)
    assert (model.weight[1] == 0).all()


def test_the_penalty_settles_near_the_same_minimum_without_zeros() -> None:
    model = Point()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = NormPenalty(ROWS, model, 1.0)
    for _ in range(2000):
        optimizer.zero_grad()
        (model.loss() + rule.penalty(model)).backward()
        optimizer.step()
    assert torch.allclose(model.weight, minimum(1.0), atol=0.02)
    assert (model.weight != 0).all()


def test_the_penalty_is_the_weighted_sum_of_norms() -> None:
    model = Point()
    with torch.no_grad():
        model.weight.copy_(TARGET)
    assert NormPenalty(ROWS, model, 0.1).penalty(model).item() == pytest.approx(0.1 * 15.5)
    # each row has two weights
    weighted = NormPenalty(ROWS, model, 0.1, weighted=True).penalty(model).item()
    assert weighted == pytest.approx(0.1 * math.sqrt(2) * 15.5)


def test_large_structures_shrink_by_the_root_of_their_size() -> None:
    model = nn.Linear(16, 1, bias=False)
    nn.init.ones_(model.weight)
    structures = [
        Structures("one", (Slices("weight", (1,), torch.tensor([[0]])),)),
        Structures("nine", (Slices("weight", (1,), torch.arange(1, 10)[None]),)),
    ]
    rule = ProximalSteps(structures, model, 1.0, Finetune(), weighted=True)
    rule.lr = 0.1
    rule.after_step(model, 0.5)
    # with the root of the size as weight, each weight of equal rows shrinks alike: by lr * strength
    expected = torch.tensor([[0.9] * 10 + [1.0] * 6])
    assert torch.allclose(model.weight, expected)


def test_what_died_stays_dead() -> None:
    model = Point()
    rule = ProximalSteps(ROWS, model, 1.0, Finetune())
    rule.lr = 100.0
    rule.after_step(model, 0.1)
    assert (model.weight == 0).all()
    with torch.no_grad():
        model.weight.fill_(1.0)
    rule.lr = 1e-6
    rule.after_step(model, 0.2)
    assert (model.weight == 0).all()


def test_the_learning_rate_is_that_of_the_schedule() -> None:
    """Without gradients, all shrinkage is strength times the sum of the learning rates."""
    model = nn.Linear(4, 2, bias=False)
    nn.init.constant_(model.weight, 1.0)

    class Still(ClassificationTask):
        def loss(self, outputs: torch.Tensor, batch: object) -> torch.Tensor:
            return 0 * outputs.sum()

    task = Still.from_arrays(torch.zeros(40, 4), torch.zeros(40, dtype=torch.long), batch_size=8)
    config = Finetune(optimizer="sgd", momentum=0.0, lr=0.1, schedule="linear", epochs=1)
    steps = len(task.loader("train"))
    rows = [Structures("rows", (Slices("weight", (0,), torch.arange(2)[:, None]),))]
    fit(model, model, task, config, rules=[ProximalSteps(rows, model, 1.0, config)])
    travelled = sum(0.1 * (1 - step / steps) for step in range(steps))
    assert model.weight.norm(dim=1).tolist() == pytest.approx([2 - travelled] * 2, rel=1e-5)


def test_a_trainer_that_tells_no_learning_rate_is_an_error() -> None:
    model = Point()
    with pytest.raises(StageError, match=r"learning rate.*method: penalty"):
        ProximalSteps(ROWS, model, 1.0, Finetune()).after_step(model, 0.5)


def test_nothing_to_regularise_needs_no_rule() -> None:
    assert training_rule("proximal", [], Point(), 1.0, Finetune(), True) is None
