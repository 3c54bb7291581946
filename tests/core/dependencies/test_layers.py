"""Convolutions, normalizations, moves of data: which groups there are, what is pinned, and the oracle on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rarefy.dependencies import cut, find_dependencies, mask
from torch import nn
from torch.nn import functional as F

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NUMBERED = "by its number"
UNLIKE = "changes more than zeroing"


class Net(nn.Module):
    """A module with a forward given as a function of itself and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def mlp(middle: Callable[..., Any], wide: int = 8, after: int = 8, **parts: Any) -> Net:
    return Net(lambda s, x: s.o(middle(s, s.i(x))), i=nn.Linear(6, wide), o=nn.Linear(after, 4), **parts)


def cnn(middle: Callable[..., Any], wide: int = 8, after: int = 8, **parts: Any) -> Net:
    ends = {"i": nn.Conv2d(3, wide, 3, padding=1), "o": nn.Conv2d(after, 4, 3, padding=1)}
    return Net(lambda s, x: s.o(middle(s, s.i(x))).flatten(2).sum(2), **ends, **parts)


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, 3, padding=1, **kwargs)


def shuffled(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.view(len(x), groups, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def written(x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, : part.shape[1]] = part
    return x


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, str]]] = {
    "residual": (lambda: cnn(lambda s, x: x + s.c(x.relu()), c=conv(8, 8)), ["i:8"], {}),
    "grouped": (
        lambda: cnn(lambda s, x: s.g(x).relu(), after=12, g=conv(8, 12, groups=4)),
        ["i:2 position", "i:4 block", "g:3 position"],
        {},
    ),
    "depthwise": (lambda: cnn(lambda s, x: s.g(x).relu(), g=conv(8, 8, groups=8)), ["i:8"], {}),
    "depth multiplier": (
        lambda: cnn(lambda s, x: s.g(x).relu(), after=24, g=conv(8, 24, groups=8)),
        ["i:8 block", "g:3 position"],
        {},
    ),
    "transposed": (
        lambda: cnn(lambda s, x: s.g(x).relu(), after=6, g=nn.ConvTranspose2d(8, 6, 2, 2)),
        ["i:8", "g:6"],
        {},
    ),
    "transposed grouped": (
        lambda: cnn(lambda s, x: s.g(x).relu(), after=12, g=nn.ConvTranspose2d(8, 12, 2, 2, groups=4)),
        ["i:4 block", "i:2 position", "g:3"],
        {},
    ),
    "transposed depthwise": (lambda: cnn(lambda s, x: s.g(x), g=nn.ConvTranspose2d(8, 8, 2, 2, groups=8)), ["i:8"], {}),
    "concat": (
        lambda: Net(
            lambda s, x: s.o(torch.cat([s.a(x), x, s.b(x)], 1)).sum((2, 3)), a=conv(3, 5), b=conv(3, 4), o=conv(12, 4)
        ),
        ["a:5", "b:4"],
        {},
    ),
    "squeeze and excitation": (
        lambda: cnn(
            lambda s, x: x * s.e(s.d(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
            d=nn.Conv2d(8, 4, 1),
            e=nn.Conv2d(4, 8, 1),
        ),
        ["i:8", "d:4"],
        {},
    ),
    "glu": (lambda: cnn(lambda s, x: F.glu(x, 1), after=4), ["i:4"], {"i": NUMBERED}),
    "pixel shuffle": (lambda: cnn(lambda s, x: F.pixel_shuffle(x, 2).relu(), wide=12, after=3), ["i:3"], {}),
    "pixel unshuffle": (lambda: cnn(lambda s, x: F.pixel_unshuffle(x, 2), wide=4, after=16), ["i:4"], {}),
    "channel shuffle": (
        lambda: cnn(lambda s, x: s.h(shuffled(s.g(x), 2)), g=conv(8, 8, groups=2), h=conv(8, 8, groups=2)),
        ["i:4 position", "g:2 position", "g:2 block", "h:4 position"],
        {"i": UNLIKE},
    ),
    "flatten": (
        lambda: Net(lambda s, x: s.o(s.i(x).relu().flatten(1)), i=conv(3, 8), o=nn.Linear(288, 4)),
        ["i:8"],
        {},
    ),
    "flatten channels last": (
        lambda: Net(lambda s, x: s.o(s.i(x).permute(0, 2, 3, 1).flatten(1)), i=conv(3, 8), o=nn.Linear(288, 4)),
        ["i:8"],
        {},
    ),
    "unfold": (
        lambda: Net(lambda s, x: s.o(F.unfold(s.i(x), 2).transpose(1, 2)).sum(1), i=conv(3, 4), o=nn.Linear(16, 5)),
        ["i:4"],
        {},
    ),
    "fold": (lambda: cnn(lambda s, x: F.fold(x.flatten(2)[:, :, :9], (4, 4), 2), after=2), [], {"i": "col2im"}),
    "learned upsampling": (
        lambda: cnn(
            lambda s, x: s.g(F.interpolate(x, scale_factor=2, mode="bilinear")),
            g=nn.ConvTranspose2d(8, 8, 4, 2, groups=8),
        ),
        ["i:8"],
        {},
    ),
    "padded shortcut": (
        lambda: cnn(lambda s, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + s.c(x), after=12, c=conv(8, 12)),
        ["i:8"],
        {"c": "pads or cuts it at a fixed place"},
    ),
    "in place": (lambda: cnn(lambda s, x: x.relu_().add_(s.c(x)), c=conv(8, 8)), ["i:8"], {}),
    "shared module": (lambda: cnn(lambda s, x: s.c(s.c(x).relu()), c=conv(8, 8)), ["i:8"], {}),
}


def over(middle: Callable[..., Any], wide: int = 8, after: int = 8, **parts: Any) -> Callable[[], nn.Module]:
    return lambda: mlp(middle, wide, after, **parts)


CHANNELS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, str]]] = {
    "halves swapped": (over(lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)), ["i:4"], {"i": NUMBERED}),
    "unequal split": (over(lambda s, x: torch.cat(x.split([3, 5], 1)[::-1], 1)), [], {"i": "split_sizes=[3, 5]"}),
    "narrow": (over(lambda s, x: x.narrow(1, 2, 4), after=4), [], {"i": "does not run"}),
    "sum of the first three": (over(lambda s, x: x + x[:, :3].sum(1, keepdim=True)), [], {"i": UNLIKE}),
    "sum of the last two": (over(lambda s, x: x + x[:, -2:].sum(1, keepdim=True)), [], {"i": UNLIKE}),
    "sum of three in the middle": (over(lambda s, x: x + x[:, 2:5].sum(1, keepdim=True)), [], {"i": UNLIKE}),
    "every second": (over(lambda s, x: x[:, ::2], after=4), [], {"i": NUMBERED}),
    "one by number": (over(lambda s, x: x * x[:, 3:4]), [], {"i": NUMBERED}),
    "constant index": (over(lambda s, x: x[:, torch.tensor([3, 1, 2])], after=3), [], {"i": NUMBERED}),
    "index_select": (
        over(lambda s, x: x.index_select(1, torch.tensor([3, 1, 2])), after=3),
        [],
        {"i": NUMBERED},
    ),
    "a number taken out": (over(lambda s, x: x * x.sum(0).tolist()[3]), [], {"i": UNLIKE}),
    "numbers of channels": (
        over(lambda s, x: x * s.e(x.argmax(1)).sum(1, keepdim=True), e=nn.Embedding(8, 5)),
        ["e:5"],
        {"i": "takes the number", "e": "data choose"},
    ),
    "sliding windows": (over(lambda s, x: x + x.unfold(1, 3, 1).sum((1, 2)).unsqueeze(1)), [], {"i": NUMBERED}),
    "triangle": (over(lambda s, x: x.T.tril().T), [], {"i": NUMBERED}),
    "triangle of a Gram matrix": (over(lambda s, x: (x.T @ x).tril(-1).sum(1)), ["i:8"], {}),
    "mirror": (over(lambda s, x: x + x.flip(1)), ["i:4"], {}),
    "roll": (over(lambda s, x: x + x.roll(1, 1)), [], {"i": NUMBERED}),
    "cumsum": (over(lambda s, x: x.cumsum(1)), [], {"i": "in an order"}),
    "sort": (over(lambda s, x: x.sort(1)[0]), [], {"i": "in an order"}),
    "topk": (over(lambda s, x: x.topk(3, 1)[0], after=3), [], {"i": "in an order"}),
    "softmax": (over(lambda s, x: x.softmax(1)), ["i:8 statistics"], {}),
    "mean": (over(lambda s, x: x + x.mean(1, keepdim=True)), ["i:8 statistics"], {}),
    "maximum": (over(lambda s, x: x + x.amax(1, keepdim=True)), ["i:8 statistics"], {}),
    "times its number": (over(lambda s, x: x * torch.arange(x.shape[1])), [], {}),
    "divided by the width": (over(lambda s, x: x / x.shape[1]), [], {"i": UNLIKE}),
    "unit length": (over(lambda s, x: F.normalize(x, dim=1)), ["i:8"], {}),
    "Gram matrix": (over(lambda s, x: (x.T @ x).flatten(), after=64), ["i:8"], {}),
    "outer product": (
        over(lambda s, x: (x[:, :, None] * s.j(x)[:, None, :]).flatten(1), wide=4, after=20, j=nn.Linear(4, 5)),
        ["i:4", "j:5"],
        {},
    ),
    "repeated": (over(lambda s, x: x.repeat(1, 2), after=16), ["i:8"], {}),
    "written into a slice": (over(lambda s, x: written(x, s.c(x)), c=nn.Linear(8, 3)), ["i:5", "i:3"], {}),
    "written into zeros": (
        over(lambda s, x: written(torch.zeros_like(x), s.c(x)), c=nn.Linear(8, 3)),
        ["i:5", "i:3"],
        {},
    ),
    "zeros of a fixed width": (over(lambda s, x: x + torch.zeros(3, 8, dtype=x.dtype)), [], {"i": "does not run"}),
    "zeros of its width": (over(lambda s, x: x + torch.zeros(x.shape, dtype=x.dtype)), ["i:8"], {}),
    "hard-coded view": (over(lambda s, x: x.view(3, 8)), [], {"i": "does not run"}),
    "gate": (over(lambda s, x: F.silu(x) * s.u(x), u=nn.Linear(8, 8)), ["i:8"], {}),
    "fused gate": (
        over(lambda s, x: (lambda a, b: F.silu(a) * b)(*x.chunk(2, -1)), wide=16),
        ["i:8"],
        {"i": NUMBERED},
    ),
    "PReLU": (over(lambda s, x: s.p(x), p=nn.PReLU(8)), ["i:8"], {}),
    "layer scale": (over(lambda s, x: x + s.g * s.j(x), j=nn.Linear(8, 8), g=nn.Parameter(torch.ones(8))), ["i:8"], {}),
    "buffer of its width": (over(lambda s, x: x * s.g, g=nn.Buffer(torch.rand(8))), ["i:8"], {}),
    "tensor that is no buffer": (over(lambda s, x: x * s.g, g=torch.rand(8).double()), [], {}),
    "data-dependent branch": (over(lambda s, x: x.relu() if x.sum() > 0 else x), ["i:8"], {}),
    "complex numbers": (
        over(lambda s, x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (-1, 2))) * 1j).flatten(1)),
        ["i:4 block"],
        {"i": NUMBERED},
    ),
    "experts": (
        lambda: Net(
            lambda s, x: torch.einsum("enh,ehd->nd", torch.einsum("nd,edh->enh", x, s.w).relu(), s.o),
            w=nn.Parameter(torch.zeros(3, 6, 8)),
            o=nn.Parameter(torch.zeros(3, 8, 4)),
        ),
        ["w:3", "w:8"],
        {},
    ),
    "weight normalized": (
        over(lambda s, x: s.c(x).relu(), c=nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        ["i:8", "c.parametrizations.weight.original1:8"],
        {},
    ),
}

NORMS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, str]]] = {
    "batch": (lambda: nn.BatchNorm2d(8), ["i:8"], {}),
    "batch without scale": (lambda: nn.BatchNorm2d(8, affine=False), ["i:8"], {}),
    "groups of two": (lambda: nn.GroupNorm(4, 8), ["i:2 position statistics", "i:4 block"], {}),
    "one group": (lambda: nn.GroupNorm(1, 8), ["i:8 statistics"], {}),
    "as many groups as channels": (lambda: nn.GroupNorm(8, 8), ["i:8"], {}),
    "groups without scale": (lambda: nn.GroupNorm(4, 8, affine=False), ["i:4 block", "i:2 position statistics"], {}),
    "instance": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), ["i:8"], {}),
    "instance without scale": (lambda: nn.InstanceNorm2d(8), ["i:8"], {}),
    "layer": (lambda: nn.LayerNorm([8, 6, 6]), ["i:8 statistics"], {}),
    "local response": (lambda: nn.LocalResponseNorm(3), [], {"i": "slides along it"}),
    "channel dropout": (lambda: nn.Dropout2d(), ["i:8"], {}),
    "softmax": (lambda: nn.Softmax2d(), ["i:8 statistics"], {}),
    **{
        str(pool): (lambda pool=pool: pool, ["i:8"], {})
        for pool in (
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.LPPool2d(2, 2),
            nn.AdaptiveAvgPool2d(3),
            nn.AdaptiveMaxPool2d(3),
            nn.Upsample(scale_factor=2),
            nn.ReflectionPad2d(1),
            nn.ReplicationPad2d(1),
            nn.CircularPad2d(1),
        )
    },
}

COARSER = ("written into a slice", "written into zeros")


def agree(found: tuple[list[str], dict[str, str]], free: list[str], pinned: dict[str, str]) -> None:
    assert found[0] == sorted(free)
    assert found[1].keys() == pinned.keys()
    for name, reason in pinned.items():
        assert reason in found[1][name]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, oracle: Any, summary: Any) -> None:
    build, free, pinned = CONVOLUTIONS[name]
    agree(summary(oracle(build(), IMAGES)), free, pinned)


@pytest.mark.parametrize("name", CHANNELS)
def test_what_is_done_with_channels(name: str, oracle: Any, summary: Any) -> None:
    build, free, pinned = CHANNELS[name]
    agree(summary(oracle(build(), X, coarser=lambda compact: name in COARSER)), free, pinned)


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_pooling(name: str, oracle: Any, summary: Any) -> None:
    build, free, pinned = NORMS[name]
    agree(summary(oracle(cnn(lambda s, x: s.n(x).relu(), n=build()), IMAGES)), free, pinned)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_along_other_numbers_of_axes(dimensions: int, oracle: Any, summary: Any) -> None:
    layer = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    model = Net(lambda s, x: s.o(s.i(x).relu()).flatten(2).sum(2), i=layer(3, 8, 2), o=layer(8, 4, 1))
    agree(summary(oracle(model, torch.randn(2, 3, *[4] * dimensions))), ["i:8"], {})


def test_sizes_in_an_attribute_are_corrected() -> None:
    model = mlp(lambda s, x: torch.cat(x.split(s.sizes, 1)[::-1], 1), sizes=[3, 5])
    deps = find_dependencies(model, (X,))
    removal = {"i": torch.tensor([0, 4, 5])}
    compact = cut(model, deps, removal)
    assert compact.sizes == [2, 3]
    torch.testing.assert_close(compact(X), mask(model, deps, removal)(X))


def test_a_hard_coded_width_is_told_with_file_and_line() -> None:
    deps = find_dependencies(mlp(lambda s, x: x.view(3, 8)), (X,))
    assert f"{__file__}:" in str(deps["i"].pinned)
    assert "x.view(3, 8)" in str(deps["i"].pinned)


def test_what_a_scale_of_zero_hides_is_found_all_the_same() -> None:
    gate = nn.Parameter(torch.zeros(1))
    model = mlp(lambda s, x: x + s.z * x[:, :3].sum(1, keepdim=True), z=gate)
    assert UNLIKE in str(find_dependencies(model, (X,))["i"].pinned)


def test_several_inputs_and_nested_outputs(oracle: Any, summary: Any) -> None:
    model = Net(
        lambda s, x, y: {"a": s.o(s.i(x) + s.j(y)), "b": (s.p(s.i(x)),)},
        i=nn.Linear(6, 8),
        j=nn.Linear(4, 8),
        o=nn.Linear(8, 3),
        p=nn.Linear(8, 2),
    )
    agree(summary(oracle(model, X, torch.randn(3, 4))), ["i:8"], {})


@dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [Output, lambda y: torch.distributions.Normal(y, 1.0), lambda y: {"a": [y, None]}])
def test_what_comes_out_is_pinned_in_whatever_object(wrap: Any) -> None:
    model = Net(lambda s, x: wrap(s.i(x)), i=nn.Linear(6, 8))
    assert find_dependencies(model, (X,)).groups == ()


def test_parameters_under_two_names_are_one(oracle: Any, summary: Any) -> None:
    model = mlp(lambda s, x: x.relu(), j=nn.Linear(6, 8), p=nn.Linear(8, 4))
    model.j.weight = model.i.weight
    model.run = lambda s, x: s.o(s.i(x).relu()) + s.p(s.j(x).tanh())
    agree(summary(oracle(model, X)), ["i:8"], {})


def test_a_layer_outside_the_module_tree_is_a_constant_to_it(summary: Any) -> None:
    hidden = [nn.Linear(8, 5)]
    model = Net(lambda s, x: s.o(s.hidden[0](s.i(x)).relu()), i=nn.Linear(6, 8), hidden=hidden, o=nn.Linear(5, 3))
    assert find_dependencies(model, (X,)).groups == ()


def test_a_forward_that_writes_into_its_input_or_state_leaves_both_alone() -> None:
    model = Net(
        lambda s, x: s.o(s.i(x.relu_())), i=nn.Linear(6, 8), o=nn.Linear(8, 4), calls=nn.Buffer(torch.zeros(()))
    )
    model.run = lambda s, x: (s.calls.add_(1), s.i.weight.data.clamp_(-0.1, 0.1), s.o(s.i(x.relu_())))[2]
    x, weight = X.clone(), model.i.weight.detach().clone()
    assert [group.name for group in find_dependencies(model, (x,)).groups] == ["i"]
    assert torch.equal(x, X)
    assert torch.equal(model.i.weight, weight)
    assert model.calls == 0


@pytest.mark.parametrize(
    "middle",
    [
        lambda s, x: x + x[:, :4].mean(1, keepdim=True),
        lambda s, x: s.n(torch.cat([x[:, :3].tanh(), x[:, 3:]], 1)),
        lambda s, x: s.n(torch.cat([x[:, 3:].tanh(), x[:, :3]], 1)),
        lambda s, x: s.n(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1),
    ],
    ids=["mean of the first half", "first three", "swap", "shuffle"],
)
def test_numbers_in_code_are_found_out_where_statistics_change(middle: Any, oracle: Any) -> None:
    oracle(mlp(middle, n=nn.LayerNorm(8)), X, coarser=lambda compact: True)


def test_slices_of_unequal_lengths_are_no_equal_parts(oracle: Any, summary: Any) -> None:
    """[8:] of 12 could be the last of three parts, but [:8] is none."""
    model = mlp(lambda s, x: torch.cat([x[:, : s.w] + s.j(x), x[:, s.w :]], 1), 12, 12, j=nn.Linear(12, 8), w=8)
    agree(summary(oracle(model, X)), ["i:8", "i:4"], {})


def test_an_axis_that_two_operators_split_unlike_goes_by_both() -> None:
    """In three parts, then as a part of a longer axis in two: what falls together either way is one unit."""

    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        first, _, third = x.chunk(3, 1)
        y = torch.cat([x + s.g, first * third], 1)
        one, other = y.chunk(2, 1)
        return one * other

    model = mlp(run, 12, 8, g=nn.Parameter(torch.ones(12)))
    for group in find_dependencies(model, (X,), verify=False).groups:
        for member in group.members:
            if member.tensor in ("i.weight", "g") and member.dim == 0:
                assert all({(i + 4) % 12 for i in unit} == set(unit) for unit in member.indices.tolist())


NOBODY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "split": lambda x: x.split([3, 0])[1],
    "slice": lambda x: x[3:],
    "index": lambda x: x[torch.zeros(0, dtype=torch.int64)],
    "mask": lambda x: x[torch.zeros(3, dtype=torch.bool)],
    "moved": lambda x: x[3:].t().contiguous().t().unflatten(1, (2, -1)).flatten(1),
}


@pytest.mark.parametrize("choose", NOBODY)
def test_an_expert_that_no_row_chose_keeps_its_channels(choose: str, oracle: Any) -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.relu(), s.e(NOBODY[choose](x))])

    names = {group.name for group in oracle(mlp(run, e=nn.Linear(8, 8)), X).groups}
    assert "i" in names


def test_places_of_maxima_are_numbers_of_channels() -> None:
    assert find_dependencies(Net(lambda s, x: s.i(x).max(1), i=nn.Linear(6, 8)), (X,)).groups == ()


def test_a_number_written_where_data_choose_pins_the_chosen_axis() -> None:
    gate = mlp(lambda s, x: x * torch.zeros_like(x).scatter(1, x.topk(2, 1).indices, 1.0))
    assert find_dependencies(gate, (X,)).groups == ()
    rows = mlp(lambda s, x: x * torch.ones_like(x).scatter_(0, torch.zeros_like(x[:1], dtype=torch.int64), 2.0))
    assert find_dependencies(rows, (X,))["i"].pinned is None


KEPT_EQUAL: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "view": lambda s, x: s.j(x).view(x.shape),
    "rows regrouped": lambda s, x: s.j(x).reshape(-1, x.shape[1]),
    "three at once": lambda s, x: s.j(x).view(x.shape) + s.k(x).view(x.shape[0], -1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("name", KEPT_EQUAL)
def test_axes_that_code_wants_equally_long_are_not_cut_apart(name: str) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    model = mlp(KEPT_EQUAL[name], j=nn.Linear(8, 8), k=nn.Linear(8, 8)).double()
    deps = find_dependencies(model, (x,))
    if name == "view":
        assert {member.tensor for member in deps["i"].members} >= {"i.weight", "j.weight", "o.weight"}
    for group in deps.groups:
        for count in (1, 4, 6):
            removal = {group.name: torch.arange(count)}
            torch.testing.assert_close(cut(model, deps, removal)(x), mask(model, deps, removal)(x))


class Keeping(nn.Module):
    """Keeps what it computed of a parameter, and drops it when tensors are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.kept = nn.Parameter(torch.rand(8)), {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "g" not in self.kept:
            self.kept["g"] = self.g.detach().exp()
        return x * self.kept["g"]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.kept = {}
        return super()._apply(*args, **kwargs)


def test_what_modules_keep_of_their_parameters_is_dropped() -> None:
    model = mlp(lambda s, x: s.k(x), k=Keeping())
    whole = model(X)
    deps = find_dependencies(model, (X,))
    assert {member.tensor for member in deps["i"].members} >= {"i.weight", "k.g"}
    removal = {"i": torch.tensor([1, 4])}
    torch.testing.assert_close(cut(model, deps, removal)(X), mask(model, deps, removal)(X))
    assert model.k.kept
    assert torch.equal(model(X), whole)


def test_groups_that_differ_only_together_are_not_both_cut() -> None:
    def doubled(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = s.k(x).relu()
        return x * 2 if s.i.weight.shape[0] < 8 and s.k.weight.shape[0] < 7 else x

    deps = find_dependencies(mlp(doubled, after=7, k=nn.Linear(8, 7)), (X,))
    assert (deps["i"].pinned is None) != (deps["k"].pinned is None)
