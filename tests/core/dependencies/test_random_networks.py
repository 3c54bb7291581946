"""Networks that nobody wrote: the oracle on random compositions of what networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
WIDTHS = st.sampled_from([4, 6, 8, 12])
# shrinking runs the oracle hundreds of times: a failing network is small enough to read
PHASES = (Phase.explicit, Phase.generate)
Draw = Callable[..., Any]


def checked(examples: int) -> Any:
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=health,
        database=None,
        phases=PHASES,
    )


class Branches(nn.Module):
    """The sum or the concatenation of what several modules make of one input."""

    def __init__(self, parts: list[nn.Module], join: str) -> None:
        super().__init__()
        self.parts, self.join = nn.ModuleList(parts), join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [part(x) for part in self.parts]
        return sum(results[1:], results[0]) if self.join == "sum" else torch.cat(results, 1)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, wide: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(wide, inner, 1), nn.Conv2d(inner, wide, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Function(nn.Module):
    """A function without parameters."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


class Heads(nn.Module):
    """Attention with heads, queries in groups, fused or separate projections."""

    def __init__(self, wide: int, heads: int, shared: int, places: int, fused: bool, kernel: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.places, self.kernel = heads * shared, heads, places, kernel
        self.parts = [self.heads * places, heads * places, heads * places]
        if fused:
            self.qkv = nn.Linear(wide, sum(self.parts))
        else:
            self.q, self.k, self.v = (nn.Linear(wide, n) for n in self.parts)
        self.fused, self.out = fused, nn.Linear(self.heads * places, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).split(self.parts, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        counts = (self.heads, self.groups, self.groups)
        q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part, n in zip(parts, counts, strict=True))
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        if self.kernel:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        else:
            mixed = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


def swapped(parts: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.cat(x.chunk(parts, 1)[::-1], 1)


def shuffled(parts: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


def divisors(wide: int) -> list[int]:
    return [n for n in range(1, wide + 1) if wide % n == 0]


def layer(draw: Draw, wide: int, depth: int) -> tuple[nn.Module, int]:
    """Draw a module on images with `wide` channels, and the number of channels it gives."""
    kinds = ["convolution", "grouped", "depthwise", "norm", "squeeze", "gate", "act", "transposed", "swap", "shuffle"]
    kind = draw(st.sampled_from(kinds + (["residual", "branches", "concat"] if depth else [])))
    if kind == "convolution":
        after = draw(WIDTHS)
        return nn.Conv2d(wide, after, 3, padding=1, bias=draw(st.booleans())), after
    if kind in ("grouped", "transposed"):
        groups = draw(st.sampled_from(divisors(wide)))
        after = groups * draw(st.integers(1, 3))
        if kind == "grouped":
            return nn.Conv2d(wide, after, 3, padding=1, groups=groups), after
        return nn.ConvTranspose2d(wide, after, 3, padding=1, groups=groups), after
    if kind == "depthwise":
        return nn.Conv2d(wide, wide, 3, padding=1, groups=wide), wide
    if kind == "norm":
        return draw(st.sampled_from([nn.BatchNorm2d(wide), *(nn.GroupNorm(n, wide) for n in divisors(wide))])), wide
    if kind in ("swap", "shuffle"):
        return Function((swapped if kind == "swap" else shuffled)(draw(st.sampled_from(divisors(wide))))), wide
    if kind == "squeeze":
        return Squeeze(wide, draw(st.integers(2, 4))), wide
    if kind == "gate" and wide % 2 == 0 and wide > 4:
        return Function(lambda x: F.glu(x, 1)), wide // 2
    if kind == "residual":
        body, after = chain(draw, wide, depth - 1)
        return Branches([nn.Identity() if after == wide else nn.Conv2d(wide, after, 1), body], "sum"), after
    if kind in ("branches", "concat"):
        parts = [chain(draw, wide, depth - 1) for _ in range(draw(st.integers(2, 3)))]
        if kind == "concat":
            return Branches([part for part, _ in parts], "concat"), sum(after for _, after in parts)
        after = draw(WIDTHS)
        return Branches([nn.Sequential(part, nn.Conv2d(n, after, 1)) for part, n in parts], "sum"), after
    return draw(st.sampled_from([nn.ReLU(), nn.SiLU(), nn.PReLU(wide)])), wide


def chain(draw: Draw, wide: int, depth: int) -> tuple[nn.Sequential, int]:
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        part, wide = layer(draw, wide, depth)
        parts.append(part)
    return nn.Sequential(*parts), wide


@st.composite
def image_networks(draw: Draw) -> nn.Module:
    """Draw a network from images to numbers."""
    first = draw(WIDTHS)
    body, wide = chain(draw, first, 2)
    parts: list[nn.Module] = [nn.Conv2d(3, first, 1), body]
    if draw(st.booleans()):
        return nn.Sequential(*parts, nn.Flatten(), nn.Linear(wide * 16, 3))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 3))


@st.composite
def token_networks(draw: Draw) -> nn.Module:
    """Draw a transformer of blocks on tokens."""
    wide = draw(WIDTHS)
    blocks: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        norm = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm, nn.Identity]))
        heads, shared, places = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(2, 5))
        inner = draw(WIDTHS)
        gated = draw(st.booleans())
        attention = Heads(wide, heads, shared, places, draw(st.booleans()), draw(st.booleans()))
        middle = nn.GLU() if gated else nn.GELU()
        feedforward = nn.Sequential(nn.Linear(wide, inner), middle, nn.Linear(inner // 2 if gated else inner, wide))
        for part in (attention, feedforward):
            blocks.append(Branches([nn.Identity(), nn.Sequential(norm(wide), part)], "sum"))
    return nn.Sequential(nn.Linear(6, wide), *blocks, nn.LayerNorm(wide), nn.Linear(wide, 3))


def muddled(model: nn.Module) -> bool:
    """Tell whether a number of heads is one of places too, so that an attribute may mean either."""

    def places(part: Heads) -> set[int]:
        return {n // heads for n, heads in zip(part.parts, (part.heads, part.groups, part.groups), strict=True)}

    return any({part.heads, part.groups} & places(part) for part in model.modules() if isinstance(part, Heads))


@checked(10)
@given(model=image_networks())
def test_networks_on_images(model: nn.Module, oracle: Any) -> None:
    oracle(model, IMAGES)


@checked(4)
@given(model=token_networks())
def test_networks_on_tokens(model: nn.Module, oracle: Any) -> None:
    oracle(model, TOKENS, coarser=muddled)


@pytest.mark.slow
@checked(150)
@given(model=image_networks())
def test_many_networks_on_images(model: nn.Module, oracle: Any) -> None:
    oracle(model, IMAGES)


@pytest.mark.slow
@checked(60)
@given(model=token_networks())
def test_many_networks_on_tokens(model: nn.Module, oracle: Any) -> None:
    oracle(model, TOKENS, coarser=muddled)
