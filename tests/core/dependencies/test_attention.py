"""Attention in its many forms, and transformers: heads, places within heads, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rarefy.dependencies import cut, find_dependencies, mask
from rarefy.errors import StageError
from rarefy.modules.attention import MultiheadAttention, opened
from torch import nn
from torch.nn import functional as F

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
SEPARATE = ["i:8 statistics", "a.q:3 block", "a.q:4 position"]
FUSED = ["i:8 statistics", "a.qkv:3 block", "a.qkv:4 position"]
KINDS = [("block", 2), ("position", 3), ("position", 5)]
THREE = {"a.qkv": "by its number"}


class Attention(nn.Module):
    """Attention over 5 tokens of width 8 with heads of width 4, projected and attended as told."""

    def __init__(self, project: str = "separate", attend: str = "plain", heads: int = 3, shared: int = 1) -> None:
        super().__init__()
        self.project, self.attend = project, attend
        self.num_heads, self.num_groups, self.head_dim, self.scale = heads, heads // shared, 4, 0.5
        if project == "separate":
            self.q = nn.Linear(8, heads * 4)
            self.k, self.v = (nn.Linear(8, self.num_groups * 4) for _ in range(2))
        else:
            self.qkv = nn.Linear(8, 3 * heads * 4)
        self.p = nn.Linear(heads * 4, 8)
        if attend == "relative":
            self.table = nn.Parameter(torch.zeros(9, heads))
        if attend == "talking":
            self.mix = nn.Linear(heads, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.projected(x)
        return self.p(self.attended(q, k, v).transpose(1, 2).flatten(2))

    def projected(self, x: torch.Tensor) -> Any:
        batch, tokens, _ = x.shape
        if self.project == "separate":
            counts = (self.num_heads, self.num_groups, self.num_groups)
            projected = zip((self.q, self.k, self.v), counts, strict=True)
            return [layer(x).view(batch, tokens, n, self.head_dim).transpose(1, 2) for layer, n in projected]
        if self.project == "three first":
            return self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.project == "chunks":
            parts = self.qkv(x).chunk(3, -1)
            return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts]
        return self.qkv(x).reshape(batch, tokens, self.num_heads, -1).transpose(1, 2).chunk(3, -1)

    def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.attend == "rotary":
            q, k = rotated(q), rotated(k)
        times = self.num_heads // self.num_groups
        if self.attend == "repeated":
            k, v = (x.repeat_interleave(times, 1) for x in (k, v))
        if self.attend == "expanded":
            k, v = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (k, v))
        if self.attend == "grouped":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=self.scale)
        if self.attend == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.attend == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
            return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.attend == "relative":
            places = torch.arange(5)
            scores = scores + self.table[places[:, None] - places + 4].permute(2, 0, 1)
        if self.attend == "talking":
            scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ v


def rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * torch.linspace(1, 2, half)
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Block(nn.Module):
    """A residual block of normalized attention between two linear layers."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.i, self.n, self.a, self.m, self.o = (
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            attention,
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.i(x)
        return self.o(self.m(x + self.a(self.n(x))))


class Calling(nn.Module):
    """torch's attention on projections of one input."""

    def __init__(self, need_weights: bool, kdim: int | None = None, vdim: int | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, kdim or 8), nn.Linear(8, vdim or 8)
        self.a = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, **kwargs)
        self.o = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.a(self.q(x), self.k(x), self.v(x), need_weights=self.need_weights)[0])


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, str]]] = {
    "separate": (lambda: Attention(), SEPARATE, {}),
    "three first": (lambda: Attention("three first"), FUSED, THREE),
    "chunks": (lambda: Attention("chunks"), FUSED, THREE),
    "three within a head": (lambda: Attention("within"), FUSED, THREE),
    "einsum": (lambda: Attention(attend="einsum"), SEPARATE, {}),
    "relative": (lambda: Attention(attend="relative"), SEPARATE, {"a.table": "by its number"}),
    "talking heads": (lambda: Attention(attend="talking"), SEPARATE, {}),
    "causal": (
        lambda: Attention(attend="causal"),
        ["i:8 statistics", "a.q:3 block", "a.q:4 position statistics"],
        {},
    ),
    "rotary": (lambda: Attention(attend="rotary"), ["i:8 statistics", "a.q:3 block"], {"a.v": "does not run"}),
    "repeated": (lambda: Attention(attend="repeated", heads=6, shared=2), SEPARATE, {}),
    "expanded": (lambda: Attention(attend="expanded", heads=6, shared=2), SEPARATE, {}),
    "grouped": (lambda: Attention(attend="grouped", heads=6, shared=2), SEPARATE, {}),
}


class Uneven(nn.Module):
    """Attention whose keys and values come out of one projection, with heads of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.widths = 2, [3, 5]
        self.q, self.kv, self.p = nn.Linear(8, 2 * 3), nn.Linear(8, 2 * 8), nn.Linear(2 * 5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, kv = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), self.kv(x)))
        k, v = kv.split(self.widths, -1)
        return self.p(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ),
    "encoder, norm first": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, activation="gelu"),
        2,
        nn.LayerNorm(8),
        enable_nested_tensor=False,
    ),
    "decoder": lambda: Twice(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)),
}


class Twice(nn.Module):
    """Gives its one input twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x)


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, oracle: Any, summary: Any) -> None:
    build, free, pinned = CASES[name]
    found = summary(oracle(Block(build()), TOKENS))
    assert found[0] == sorted(free)
    assert found[1].keys() == pinned.keys()
    assert all(reason in found[1][group] for group, reason in pinned.items())


def test_places_of_keys_and_of_values_go_together_and_heads_with_neither(oracle: Any) -> None:
    model = Block(Uneven())
    deps = oracle(model, TOKENS)
    heads, keys, values = (next(g for g in deps.groups if (g.kind, g.units) == k) for k in KINDS)
    assert all(group.overlaps for group in (heads, keys, values))
    removal = {keys.name: torch.tensor([0, 2]), values.name: torch.tensor([1, 2, 3])}
    compact = cut(model, deps, removal)
    assert compact.a.widths == [1, 2]
    assert compact.a.kv.weight.shape == (2 * 3, 8)
    torch.testing.assert_close(compact(TOKENS.double()), mask(model, deps, removal)(TOKENS.double()))
    for other in removal:
        with pytest.raises(StageError, match="in two ways at once"):
            cut(model, deps, {other: removal[other], heads.name: torch.tensor([0])})


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"batch_first": True}, {"kdim": 6, "vdim": 5}, {"kdim": 6}], ids=str
)
def test_torch_attention_loses_heads_and_places(kwargs: dict[str, Any], need_weights: bool, oracle: Any) -> None:
    deps = oracle(Calling(need_weights, **kwargs), TOKENS)
    kinds = {(group.kind, group.units) for group in deps.groups if group.name.startswith("a.")}
    assert {("block", 2), ("position", 4), ("channel", 8)} <= kinds


@pytest.mark.parametrize("kwargs", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_torch_attention_with_extra_tokens_stays_whole(kwargs: dict[str, Any], oracle: Any) -> None:
    deps = oracle(Calling(True, **kwargs), TOKENS)
    assert [group.name for group in deps.groups] == ["a.out_proj"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, oracle: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), TRANSFORMERS[name](), nn.Linear(8, 3))
    deps = oracle(model, TOKENS)
    stream = deps["0"]
    assert stream.changes_statistics
    assert {member.tensor for member in stream.members} > {"0.weight", "0.bias", "2.weight"}
    assert sum(group.kind == "block" for group in deps.groups) == sum(
        type(module) is nn.MultiheadAttention for module in model.modules()
    )


def test_the_fast_path_of_torchs_encoder_is_left_to_whole_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), TRANSFORMERS["encoder"](), nn.Linear(8, 3)).eval()
    deps = find_dependencies(model, (TOKENS,))
    heads = next(group for group in deps.groups if group.kind == "block")
    compact = cut(model, deps, {heads.name: torch.tensor([0])})
    with torch.no_grad():
        fast = compact(TOKENS)
    torch.testing.assert_close(compact(TOKENS), fast, atol=1e-5, rtol=1e-5)


class TestOpenedAttention:
    """rarefy's attention against torch's, on the same weights."""

    MASKS: dict[str, Callable[[], dict[str, Any]]] = {
        "none": dict,
        "boolean": lambda: {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
        "additive": lambda: {"attn_mask": torch.randn(5, 5)},
        "per head": lambda: {"attn_mask": torch.randn(3 * 2, 5, 5)},
        "padding": lambda: {"key_padding_mask": torch.tensor([[False] * (5 - n) + [True] * n for n in (0, 1, 3)])},
        "additive padding": lambda: {"key_padding_mask": torch.randn(3, 5)},
        "both": lambda: {
            "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
            "key_padding_mask": torch.tensor([[False] * (5 - n) + [True] * n for n in (0, 1, 3)]),
        },
        "causal": lambda: {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True},
    }

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("averaged", [True, False])
    @pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"batch_first": True}, {"kdim": 6, "vdim": 5}], ids=str)
    def test_it_computes_the_same(self, mask: str, need_weights: bool, averaged: bool, kwargs: dict[str, Any]) -> None:
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(8, 2, **kwargs)
        if theirs.in_proj_bias is not None:
            nn.init.normal_(theirs.in_proj_bias)
        ours = opened(theirs)
        assert type(ours) is MultiheadAttention
        widths = (8, theirs.kdim, theirs.vdim)
        inputs = [torch.randn((3, 5, n) if theirs.batch_first else (5, 3, n)) for n in widths]
        options = {"need_weights": need_weights, "average_attn_weights": averaged, **self.MASKS[mask]()}
        for given, wanted in zip(ours(*inputs, **options), theirs(*inputs, **options), strict=True):
            assert (given is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(given, wanted)

    def test_without_a_batch(self) -> None:
        theirs = nn.MultiheadAttention(8, 2)
        x = torch.randn(5, 8)
        for given, wanted in zip(opened(theirs)(x, x, x), theirs(x, x, x), strict=True):
            torch.testing.assert_close(given, wanted)

    def test_without_a_batch_with_masks(self) -> None:
        theirs = nn.MultiheadAttention(8, 2)
        x = torch.randn(5, 8)
        options = {"attn_mask": torch.randn(2, 5, 5), "key_padding_mask": torch.randn(5)}
        for given, wanted in zip(opened(theirs)(x, x, x, **options), theirs(x, x, x, **options), strict=True):
            torch.testing.assert_close(given, wanted)

    def test_dropout_drops_in_training_only(self) -> None:
        x = torch.randn(5, 3, 8)
        ours = opened(nn.MultiheadAttention(8, 2, dropout=0.9))
        assert not torch.equal(ours.train()(x, x, x)[0], ours(x, x, x)[0])
        assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x)[0])

    def test_gradients_reach_the_very_parameters(self) -> None:
        theirs = nn.MultiheadAttention(8, 2)
        ours = opened(theirs)
        assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        assert all(one is other for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))

    def test_a_mask_per_head_does_not_fit_fewer_heads(self) -> None:
        model = Masked()
        deps = find_dependencies(model, (TOKENS.transpose(0, 1), torch.randn(4, 5, 5)))
        assert all(group.kind != "block" for group in deps.groups)

    def test_whole_heads_cannot_go_with_places(self) -> None:
        model = Calling(True)
        deps = find_dependencies(model, (TOKENS,))
        names = [group.name for group in deps.groups if group.overlaps]
        assert len(names) == 2
        with pytest.raises(StageError, match="in two ways at once"):
            cut(model, deps, {name: torch.tensor([0]) for name in names})


class Masked(nn.Module):
    """Attention whose mask has its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.o(self.a(x, x, x, attn_mask=mask)[0])
