"""What counts as a neuron, and the trial that tells whether neurons may be merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rarefy.dependencies.groups import Group, Member
from rarefy_pruning.sharing.merging import Merge
from rarefy_pruning.sharing.neurons import Neurons, incoming, merge_columns_, neurons_of, outgoing
from rarefy_pruning.sharing.probe import why_not_alike
from torch import nn
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def group(*members: tuple[str, int, int], units: int = 6, **options: Any) -> Group:
    """Return a group of members `(tensor, dimension, places per unit)`, a unit's places side by side."""
    made = [Member(tensor, dim, torch.arange(units * k).reshape(units, k)) for tensor, dim, k in members]
    return Group("g", tuple(made), **options)


def settle_(norm: Any) -> Any:
    """Give a normalization statistics that matter."""
    torch.manual_seed(1)
    for tensor in (norm.running_mean, norm.running_var.add_(0.5), norm.weight, norm.bias):
        if tensor is not None:
            tensor.data += torch.rand(tensor.shape)
    return norm


LINEAR = group(("0.weight", 0, 1), ("0.bias", 0, 1), ("2.weight", 1, 1))


def chain(*between: nn.Module) -> nn.Sequential:
    """Return layers of 6 neurons with something between them."""
    torch.manual_seed(0)
    middle = between[0] if len(between) == 1 else nn.Sequential(*between)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 3)).eval()


def asked(model: nn.Module, found: Group, *inputs: torch.Tensor, layer: str = "0") -> str | None:
    neurons = neurons_of(model, found, layer)
    assert isinstance(neurons, Neurons), neurons
    return why_not_alike(model, neurons, inputs, seed=0)


class TestNeurons:
    def test_a_normalization_is_folded_in(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 6, 3), settle_(nn.BatchNorm2d(6)), nn.Conv2d(6, 3, 1)).eval()
        names = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
        found = group(("0.weight", 0, 1), ("0.bias", 0, 1), *((n, 0, 1) for n in names), ("2.weight", 1, 1))
        neurons = neurons_of(model, found, "0")
        assert isinstance(neurons, Neurons)
        own = incoming(model, neurons).float()
        x = torch.randn(5, 2, 7, 7)
        by_hand = F.conv2d(x, own[:, :-1].reshape(6, 2, 3, 3), own[:, -1])
        assert torch.allclose(by_hand, model[:2](x), atol=1e-5)

    def test_readers_give_a_row_per_output_place_and_tap(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(12, 3), "c": nn.Conv2d(6, 2, (1, 3))})
        neurons = neurons_of(model, group(("a.weight", 0, 1), ("b.weight", 1, 2), ("c.weight", 1, 1)), "a")
        assert isinstance(neurons, Neurons)
        rows = outgoing(model, neurons)
        assert rows.shape == (3 * 2 + 2 * 3, 6)
        assert torch.equal(rows[:6, 5], model["b"].weight[:, 10:12].flatten().double())
        assert torch.equal(rows[6:, 5], model["c"].weight[:, 5].flatten().double())

    @pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (3, 12, 2, 3)])
    def test_columns_merge_where_they_stand(self, shape: tuple[int, ...]) -> None:
        weight, indices = nn.Parameter(torch.randn(shape)), torch.tensor([[7, 1], [0, 3], [10, 11]])
        before = weight.detach().clone()
        merge_columns_(weight, indices, [])
        assert torch.equal(weight, before)
        merge_columns_(weight, indices, [Merge(kept=0, removed=2, saliency=0.0)])
        expected = before.clone()
        expected[:, 7], expected[:, 1] = before[:, 7] + before[:, 10], before[:, 1] + before[:, 11]
        expected[:, [10, 11]] = 0
        assert torch.allclose(weight, expected)

    @pytest.mark.parametrize(
        ("found", "told"),
        [
            (group(("0.weight", 0, 1), pinned="it is part of the output"), "part of the output"),
            (group(("0.weight", 0, 1), ("2.weight", 1, 1), kind="block"), "only be cut by whole blocks"),
            (group(("0.weight", 0, 1), ("2.weight", 1, 1), overlaps=True), "another way"),
            (group(("0.weight", 0, 1), ("2.weight", 1, 1), changes_statistics=True), "a mean or a variance"),
            (group(("0.weight", 0, 1), ("2.weight", 1, 1), units=1), "one neuron"),
            (group(("0.weight", 0, 1)), "no layer reads them"),
            (group(("0.weight", 0, 2), ("2.weight", 1, 1), units=3), "several rows"),
            (group(("0.weight", 0, 1), ("1.weight", 0, 1), ("2.weight", 1, 1)), "'1.weight' of a PReLU"),
            (group(("0.weight", 0, 1), ("3.weight", 0, 1), ("2.weight", 1, 1), units=3), "with those of 3"),
            (group(("0.weight", 0, 1), ("4.weight", 0, 1)), "'4.weight' of a ConvTranspose2d"),
            (group(("0.weight", 0, 1), ("5.weight", 1, 1)), "'5.weight' of a Conv2d"),
            (group(("0.weight", 0, 1), ("6.weight", 0, 1), ("7.weight", 0, 1), ("2.weight", 1, 1)), "more than once"),
            (group(("0.weight", 0, 1), ("8.weight", 0, 1), ("2.weight", 1, 1)), "'8.weight' of a BatchNorm1d"),
        ],
    )
    def test_what_cannot_be_merged_is_told(self, found: Group, told: str) -> None:
        model = nn.Sequential(
            nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3), nn.Linear(4, 6), nn.ConvTranspose2d(6, 2, 1),
            nn.Conv2d(12, 2, 1, groups=2), nn.BatchNorm1d(6), nn.BatchNorm1d(6),
            nn.BatchNorm1d(6, track_running_stats=False),
        )  # fmt: skip
        reason = neurons_of(model, found, "0")
        assert isinstance(reason, str)
        assert told in reason


class Halves(nn.Module):
    """Half of the neurons go through another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[..., :3].relu(), x[..., 3:].tanh()), -1)


class Scaled(nn.Module):
    """Each neuron has a constant of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() * torch.linspace(1, 2, 6)


class Gram(nn.Module):
    """Neurons that also meet each other in a product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x


class Competing(nn.Module):
    """Neurons whose maximum matters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)


class Unseen(nn.Module):
    """A reader that is not called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.first(x).relu(), self.second.weight, self.second.bias)


class TestTrial:
    @pytest.mark.parametrize(
        "between", [nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Identity(), nn.Dropout(0.5), nn.Hardswish(), nn.Softplus()]
    )
    def test_any_elementwise_function_will_do(self, between: nn.Module) -> None:
        assert asked(chain(between), LINEAR, torch.randn(8, 4)) is None

    @pytest.mark.parametrize(
        ("between", "told"), [(Halves(), "different functions"), (Scaled(), "different functions"),
                              (Gram(), "depends on the others"), (Competing(), "depends on the others")],
    )  # fmt: skip
    def test_other_functions_are_found_out(self, between: nn.Module, told: str) -> None:
        assert told in str(asked(chain(between), LINEAR, torch.randn(8, 4)))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    def test_a_normalization_must_follow_directly(self, bias: bool, affine: bool) -> None:
        torch.manual_seed(0)
        norm = settle_(nn.BatchNorm2d(6, affine=affine))
        leaves = ("running_mean", "running_var", *(("weight", "bias") if affine else ()))

        def members(place: int) -> Group:
            own = (("0.weight", 0, 1), *((("0.bias", 0, 1),) if bias else ()))
            return group(*own, *((f"{place}.{leaf}", 0, 1) for leaf in leaves), ("4.weight", 1, 9))

        first, last = nn.Conv2d(2, 6, 3, bias=bias), nn.Linear(54, 3)
        x = torch.randn(4, 2, 8, 8)
        before = nn.Sequential(first, norm, nn.Tanh(), nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), last).eval()
        after = nn.Sequential(first, nn.Tanh(), norm, nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), last).eval()
        assert asked(before, members(1), x) is None
        assert "does not follow directly" in str(asked(after, members(2), x))

    def test_a_reader_that_cannot_be_watched_is_told(self) -> None:
        found = group(("first.weight", 0, 1), ("first.bias", 0, 1), ("second.weight", 1, 1))
        assert "not called as a module" in str(asked(Unseen(), found, torch.randn(4, 4), layer="first"))

    def test_a_trial_that_shows_nothing_is_told(self) -> None:
        dead = nn.Threshold(1e9, 0.0)
        assert "nothing gets through" in str(asked(chain(dead), LINEAR, torch.randn(4, 4)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_types_of_numbers_work(self, dtype: torch.dtype) -> None:
        assert asked(chain(nn.ReLU()).to(dtype), LINEAR, torch.randn(8, 4, dtype=dtype)) is None

    def test_the_model_stays_as_it_is(self) -> None:
        model = chain(nn.ReLU())
        before = copy.deepcopy(model.state_dict())
        asked(model, LINEAR, torch.randn(8, 4))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())
