"""Runs without values, where there is nothing to compute, and with them, where code or a rule asks for some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rarefy.dependencies.finding import observe
from torch import nn

X = torch.randn(2, 3)


class Plain(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self.a(x)))


class Branching(Plain):
    """It looks at a value."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.sum() > 1e9) else x.relu()


class Shuffled(Plain):
    """A buffer says where each channel goes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([5, 3, 1, 0, 2, 4]))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.order]


class Tabled(Plain):
    """It adds a row of a table that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.eye(6)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() + self.table[0]


WITH_VALUES: dict[type[Plain], str | None] = {
    Branching: None,
    Shuffled: "code picks it by its number",
    Tabled: "it meets values that belong to no channel, such as the model's inputs or a constant",
}
"""Why the hidden units cannot be cut, by model."""


def test_a_network_of_plain_layers_computes_nothing(oracle: Any) -> None:
    assert observe(Plain(), (X,)).trace.valueless
    assert [group.name for group in oracle(Plain(), X).groups] == ["a"]


@pytest.mark.parametrize("kind", WITH_VALUES)
def test_code_that_asks_for_values_gets_them(kind: type[Plain], oracle: Any) -> None:
    model = kind()
    assert not observe(model, (X,)).trace.valueless
    assert not any(tensor.is_meta for tensor in (*model.state_dict().values(), getattr(model, "table", X)))
    assert oracle(model, X)["a"].pinned == WITH_VALUES[kind]
