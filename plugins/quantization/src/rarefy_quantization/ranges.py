"""What range of values a grid covers. Zeros are on every grid, so they are left out of all counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from rarefy_quantization.grids import Grid

SHRINK = tuple(torch.logspace(0, -2, 121, dtype=torch.float64).tolist())
"""Shares of the full range that are tried, from 1 to 0.01, each 3.8 % below the last."""
BINS, PER_BIN = 2048, 16
"""Most bins of the histogram whose divergence is measured, and fewest weights per bin on average."""


class RangeOptions(Protocol):
    """How a range is chosen; see `config.GridQuantization`."""

    range: str
    percentile: float
    symmetric: bool


def fit_grid(units: torch.Tensor, bits: int, config: RangeOptions) -> Grid:
    """Return a grid for each row of `units`, `(units, size)`, with the range that the options ask for."""
    least, most = _quantiles(units, config.percentile / 100) if config.range == "percentile" else _ends(units)
    if config.range == "entropy":
        share = least_divergence(_magnitudes(units, least, most), 2 ** (bits - 1))
        least, most = least * share, most * share
    if config.range == "mse":
        candidates = (Grid.between(least * share, most * share, bits, config.symmetric) for share in SHRINK)
        return least_error(units, candidates)
    return Grid.between(least, most, bits, config.symmetric)


def least_error(units: torch.Tensor, candidates: Iterable[Grid]) -> Grid:
    """Return for each unit the grid with the least squared error, of equally good ones the first."""
    candidates = iter(candidates)
    best = next(candidates)
    error = best.error(units)
    for grid in candidates:
        its = grid.error(units)
        better = its < error
        error = torch.where(better, its, error)
        pairs = ((grid.step, best.step), (grid.low, best.low), (grid.high, best.high))
        best = Grid(*(torch.where(better, new, old) for new, old in pairs))
    return best


def least_divergence(magnitudes: torch.Tensor, levels: int) -> float:
    """Return the share of the range, in (0, 1], at which clipping and rounding change a histogram least.

    `magnitudes`, (n,), lie in (0, 1]. The histogram clipped to a share of the range, what lies beyond in its last bin,
    is compared by the Kullback-Leibler divergence with what each of the `levels` cells of the rounding makes of the
    weights inside, when it spreads them evenly over its bins that are not empty (Migacz 2017, 8-bit inference with
    TensorRT). With too few weights for two bins per cell, whose histogram would say nothing, it is the whole range.
    """
    most = min(BINS, magnitudes.numel() // PER_BIN)
    if most < 2 * levels:
        return 1.0
    counts = torch.histc(magnitudes.double(), most, 0, 1)
    tried = range(most, max(levels, most // 16) - 1, -max(1, most // 256))
    divergences = {bins: _divergence(counts, bins, levels) for bins in tried}
    return min(divergences, key=lambda bins: divergences[bins]) / most


def _divergence(counts: torch.Tensor, bins: int, levels: int) -> float:
    inside = counts[:bins]
    if not inside.any():
        return torch.inf
    clipped = inside.clone()
    clipped[-1] += counts[bins:].sum()
    centres = (torch.arange(bins, device=counts.device) + 0.5) / bins
    cells = (centres * (levels - 1)).round().long()
    filled = (clipped > 0).double()
    sums, places = (torch.zeros_like(inside[:levels]).index_add(0, cells, of) for of in (inside, filled))
    spread = filled * (sums / places.clamp(min=1))[cells]
    # outliers may lie where nothing else does, and a few of them should not cost infinitely much
    spread = torch.where((filled > 0) & (spread == 0), 0.5, spread)
    ours, theirs = clipped / clipped.sum(), spread / spread.sum()
    return float((torch.special.xlogy(ours, ours) - torch.special.xlogy(ours, theirs)).sum())


def _ends(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return units.amin(1, keepdim=True).clamp(max=0), units.amax(1, keepdim=True).clamp(min=0)


def _quantiles(units: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values at 1 - `share` and `share` of each unit's weights that are not zero, 0 among them."""
    ordered = units.masked_fill(units == 0, torch.inf).sort(1).values
    last = (units.count_nonzero(1).unsqueeze(1) - 1).clamp(min=0)
    least, most = (ordered.gather(1, (last * part).round().long()) for part in (1 - share, share))
    empty = most.isinf()
    return least.masked_fill(empty, 0).clamp(max=0), most.masked_fill(empty, 0).clamp(min=0)


def _magnitudes(units: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes of what is not zero as shares of their end of their unit's range, (n,)."""
    shares = torch.where(units < 0, units / least, units / most)
    return shares[units != 0]
