"""Recurrent layers and cells, embeddings, tokens and positions, and parametrized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rarefy.dependencies import cut, find_dependencies
from rarefy.errors import StageError
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

SEQUENCE = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, layer: nn.RNNBase, wide: int) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Linear(8, 6), layer, nn.Linear(wide, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.a(self.i(x))[0].tanh())


class Stepper(nn.Module):
    """A cell stepped through a sequence."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Linear(8, 6), cell, nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in self.i(x):
            state = self.a(step, state)
        return self.o(state[0] if isinstance(state, tuple) else state)


class Language(nn.Module):
    """Tokens to logits with the same matrix, learned positions and a token for the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.norm = nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.whole, self.places = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(6, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.whole.expand(len(ids), -1, -1), self.embed(ids)], 1) + self.places
        x = x + self.middle(x)
        return F.linear(self.norm(x)[:, 0], self.embed.weight)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "kwargs", [{}, {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}], ids=str
)
def test_recurrent_layers_lose_inputs_and_hidden_units(kind: Any, kwargs: dict[str, Any], oracle: Any) -> None:
    wide = 10 if kwargs.get("bidirectional") else 5
    model = Tagger(kind(6, 5, **kwargs), wide)
    deps = oracle(model, SEQUENCE)
    assert [(group.name, group.units) for group in deps.groups] == [("i", 6), ("a.weight_ih_l0", 5)]
    compact = cut(model, deps, {"i": torch.tensor([0]), "a.weight_ih_l0": torch.tensor([1, 4])})
    assert (compact.a.input_size, compact.a.hidden_size, compact.o.in_features) == (5, 3, wide * 3 // 5)


def test_a_projected_hidden_state_stays_whole(oracle: Any) -> None:
    assert oracle(Tagger(nn.LSTM(6, 5, proj_size=3, num_layers=2), 3), SEQUENCE).groups == ()


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(kind: Any, oracle: Any) -> None:
    deps = oracle(Stepper(kind(6, 5)), SEQUENCE)
    assert sorted(group.units for group in deps.groups) == [5, 6]


def test_tied_embedding_with_tokens_and_positions(oracle: Any, summary: Any) -> None:
    deps = oracle(Language(), IDS)
    free, pinned = summary(deps)
    assert free == ["whole:8 statistics"]
    assert "data choose" in pinned["embed"]
    places = {(member.tensor, member.dim) for member in deps["whole"].members}
    assert {("embed.weight", 1), ("whole", 2), ("places", 1), ("middle.weight", 0), ("norm.weight", 0)} <= places


def test_an_embedding_that_renormalizes_its_rows_is_not_changed() -> None:
    model = nn.Sequential(nn.Embedding(7, 6, max_norm=0.1), nn.Linear(6, 3))
    before = model[0].weight.detach().clone()
    find_dependencies(model, (IDS,))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("parametrize", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_weights_that_depend_on_all_of_a_matrix_stay_whole(parametrize: Any) -> None:
    model = nn.Sequential(parametrize(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))
    assert find_dependencies(model, (SEQUENCE,)).groups == ()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_module_that_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 3))
    with pytest.raises(StageError, match=r"cannot be copied.*parametrizations\.weight_norm"):
        find_dependencies(model, (SEQUENCE,))
