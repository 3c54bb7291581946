"""Quantized ReLUs whose levels suit the positive half of a normal distribution."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from rarefy.modules import register_module
from torch import nn

from rarefy_quantization.lloyd import density, lloyd
from rarefy_quantization.parametrizations import with_gradient

_POINTS = 200_000
"""Quantiles that stand for the distribution."""
_ROUNDS = 10_000


@cache
def half_gaussian_levels(count: int, uniform: bool) -> tuple[float, ...]:
    """Return the `count` levels above zero with the least squared error for |x|, x standard normal.

    Lloyd's iterations on quantiles of the distribution; with `uniform` the levels are d, 2 d, ..., of which each round
    takes the d that fits best the levels that are nearest by then (Cai et al. 2017, section 4.2 and eq. 9).
    """
    # modules of a file are constructed on the meta device
    places = (torch.arange(_POINTS, dtype=torch.float64, device="cpu") + 0.5) / _POINTS
    values = math.sqrt(2) * torch.erfinv(places)
    if not uniform:
        start = density(values, count, torch.Generator())
        return tuple(lloyd(values, start, _ROUNDS).tolist())
    step = 3.0 / count
    for _ in range(_ROUNDS):
        codes = (values / step).round().clamp(1, count)
        before, step = step, float((codes * values).sum() / codes.square().sum())
        if step == before:
            break
    return tuple(step * number for number in range(1, count + 1))


@register_module
class HalfWave(nn.Module):
    """0 for x <= 0 and the nearest level above it for the others: 2^bits - 1 levels times `sigma`.

    The gradient is that of a ReLU up to the largest level q; beyond it 0, or with `log_tailed` 1 / (x / sigma - q + 1)
    (Cai et al. 2017, eq. 12 and 14).
    """

    def __init__(self, bits: int, uniform: bool = True, log_tailed: bool = False, sigma: float = 1.0) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"a half-wave quantizer has from 1 to 8 bits, not {bits}")
        self.bits, self.uniform, self.log_tailed, self.sigma = bits, uniform, log_tailed, sigma
        self.levels = half_gaussian_levels(2**bits - 1, uniform)
        """The levels above zero, for a standard deviation of 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the quantized activations."""
        scaled, levels = x / self.sigma, self.levels
        edges = (0.0, *((low + high) / 2 for low, high in pairwise(levels)))
        values = torch.zeros_like(scaled)
        # no table look-up: exporters know comparisons
        for edge, level in zip(edges, levels, strict=True):
            values = torch.where(scaled.detach() > edge, level, values)
        tail = torch.log1p((scaled - levels[-1]).clamp(min=0)) if self.log_tailed else 0.0
        return with_gradient(values, scaled.clamp(0.0, levels[-1]) + tail) * self.sigma

    def extra_repr(self) -> str:
        """Return what the printed model says of the module."""
        return f"bits={self.bits}, uniform={self.uniform}, log_tailed={self.log_tailed}, sigma={self.sigma:.4g}"
