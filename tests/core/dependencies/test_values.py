"""Runs without values, where there is nothing to compute, and with them, where code or a rule asks for some."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rarefy.dependencies import cut, find_dependencies
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


PICKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index": lambda table, places: table[:, places],
    "index_select": lambda table, places: table.index_select(1, places.flatten()).view(6, 2, 2),
    "gather": lambda table, places: table.gather(1, places.view(1, 4).expand(6, 4)).view(6, 2, 2),
}


class Picking(Plain):
    """A buffer says which columns of a table are taken."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.table = name, nn.Parameter(torch.randn(6, 4))
        self.register_buffer("places", torch.tensor([[3, 0], [1, 2]]))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + PICKS[self.name](self.table, self.places).sum((1, 2))


@pytest.mark.parametrize("name", PICKS)
def test_places_without_values_are_not_read(name: str, oracle: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rarefy")
    model = Picking(name)
    assert not observe(model, (X,)).trace.valueless
    assert "where its channels go depends on values" in caplog.text
    assert {member.tensor for member in oracle(model, X)["a"].members} >= {"a.weight", "table", "b.weight"}


class Tied(nn.Module):
    """An embedding under a normalization is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.a = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return nn.functional.linear(self.norm(x + self.a(self.norm(x)).relu()), self.embed.weight)


def test_the_width_of_a_tied_embedding_is_free() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(9).unsqueeze(0)
    deps = find_dependencies(model, (tokens,))
    group = next(group for group in deps.groups if any(member.tensor == "norm.weight" for member in group.members))
    assert (group.pinned, group.units) == (None, 8)
    assert cut(model, deps, {group.name: torch.arange(3)})(tokens).shape == (1, 9, 9)


class Apart(nn.Module):
    """Three layers far from each other have to be equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(3, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.i(x)
        for block in self.blocks:
            x = x + block(x).view(len(x), x.shape[1])
        return self.o(x)


def test_widths_that_agree_by_force_are_tied_across_the_model() -> None:
    torch.manual_seed(0)
    model = Apart()
    deps = find_dependencies(model, (X,))
    (group,) = deps.groups
    assert {member.tensor for member in group.members} >= {"i.weight", "blocks.0.0.weight", "blocks.1.0.weight"}
    assert cut(model, deps, {group.name: torch.arange(3)})(X).shape == (2, 2)
