"""Weight sharing at the least error for the entropy that the codes may have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from rarefy_quantization.config import EntropyConstrainedConfig
from rarefy_quantization.sharing import TensorQuantizer

_SAMPLE, _STEPS = 8192, 16
"""Most weights of a layer that the price of a bit is found on, and steps of the bisection."""
_ELEMENTS = 2**22
"""Most costs that are computed at a time."""


class EntropyConstrained(TensorQuantizer[EntropyConstrainedConfig]):
    """Least sum h (w - c)^2 + price * bits over all layers (Choi et al. 2017, eq. 15 and algorithm 1).

    One price in all layers is what makes the error least for a mean rate: at another allocation a bit would save more
    in one layer than it costs in another.
    """

    def prepare(self, tensors: Mapping[str, torch.Tensor], importances: Mapping[str, torch.Tensor]) -> None:
        """Find the price at which the mean rate of all layers is the wanted one, by bisection of its logarithm."""
        draw = torch.Generator().manual_seed(self.seed)
        samples = []
        for name, tensor in tensors.items():
            alive = tensor != 0
            values, weights = tensor[alive].double(), importances[name][alive] if name in importances else None
            chosen = torch.randperm(values.numel(), generator=draw)[:_SAMPLE].to(values.device)
            samples.append((values.numel(), values[chosen], None if weights is None else weights[chosen]))
        total = max(1, sum(count for count, _, _ in samples))

        def rate(price: float) -> float:
            return sum(n * self._entropy(values, weights, price) for n, values, weights in samples) / total

        scale = max((float(values.square().mean()) for _, values, _ in samples if values.numel()), default=1.0)
        weighed = [float(weights.mean()) for _, _, weights in samples if weights is not None]
        low, high = -40.0, 10.0
        unit = scale * max(weighed, default=1.0)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if rate(unit * 2**middle) > self.config.rate else (low, middle)
        self.price = unit * 2**high
        if rate(self.price) < 0.9 * self.config.rate:
            self.notes.append(
                f"{self.config.bits} bits make codes of {rate(self.price):.2f} bits on average, {self.config.rate:g} "
                "were asked for: raise `bits`"
            )

    def quantize(
        self, values: torch.Tensor, importance: torch.Tensor | None, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Share the values at the price that was found."""
        codes, levels = _shared(values.double(), importance, count, self.price, self.config.rounds)
        codebook, again = torch.unique(levels.to(values.dtype), return_inverse=True)
        return again[codes], codebook

    def _entropy(self, values: torch.Tensor, importance: torch.Tensor | None, price: float) -> float:
        if values.numel() < 2:
            return 0.0
        count = min(2**self.config.bits, values.numel())
        codes, levels = _shared(values, importance, count, price, self.config.rounds)
        return float(bits_of(torch.bincount(codes, minlength=levels.numel()))[codes].mean())


def _shared(
    values: torch.Tensor, importance: torch.Tensor | None, count: int, price: float, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start from multiples of the step that is best at many bits, or as many as there may be."""
    weights = torch.ones_like(values) if importance is None else importance.to(values)
    # an error of step^2 / 12 falls by 2 ln 2 of itself per bit, and a bit is worth its price
    step = (6 * price / (math.log(2) * float(weights.mean()))) ** 0.5
    least, most = float(values.min()), float(values.max())
    step = max(step, (most - least) / max(count - 2, 1), 1e-300)
    start = step * torch.arange(round(least / step), round(most / step) + 1, dtype=values.dtype, device=values.device)
    return share(values, weights, start[:count], price, rounds)


def share(
    values: torch.Tensor, importance: torch.Tensor, start: torch.Tensor, price: float, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the code of each value, (n,), and the levels that are in use, ascending.

    Alternates between the code with the least h (w - c)^2 + price * bits for each value and the weighted mean and the
    bits of each code, none of which raises the sum; a level that nobody takes is gone.
    """
    levels, bits = start, torch.full_like(start, torch.log2(torch.tensor(float(start.numel()))).item())
    before: torch.Tensor | None = None
    for _ in range(rounds):
        codes = _cheapest(values, importance, levels, price * bits)
        used, codes = torch.unique(codes, return_inverse=True)
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        mass, sums = (torch.zeros_like(levels[used]).index_add(0, codes, x) for x in (importance, importance * values))
        levels, bits = sums / mass, bits_of(torch.bincount(codes, minlength=used.numel()))
    return codes, levels[: int(codes.max()) + 1] if codes.numel() else levels


def bits_of(counts: torch.Tensor) -> torch.Tensor:
    """Return -log2 of the shares, in double precision."""
    return -torch.log2(counts.double() / counts.sum())


def _cheapest(
    values: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, prices: torch.Tensor
) -> torch.Tensor:
    rows = max(1, _ELEMENTS // levels.numel())
    pieces = zip(values.split(rows), importance.split(rows), strict=True)
    return torch.cat([(h[:, None] * (w[:, None] - levels).square() + prices).argmin(1) for w, h in pieces])
