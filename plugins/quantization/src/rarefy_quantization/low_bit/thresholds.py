"""Weights of three values: zero, and what stands for those beyond a threshold on either side."""

from __future__ import annotations

import torch
from torch import nn

from rarefy_quantization.grids import Units, round_step
from rarefy_quantization.low_bit.projection import Projection, wide
from rarefy_quantization.parametrizations import with_gradient


def approximate(magnitudes: torch.Tensor) -> torch.Tensor:
    """Tell which magnitudes `(units, size)` exceed 0.7 times the mean of their unit (Li et al. 2016).

    Zeros do not count in the mean: a pruning made them, and the rule is about the weights that are left.
    """
    alive = magnitudes.count_nonzero(1).clamp(min=1).unsqueeze(1)
    return magnitudes > 0.7 * magnitudes.sum(1, keepdim=True) / alive


def exact(magnitudes: torch.Tensor) -> torch.Tensor:
    """Tell which magnitudes `(units, size)` to keep for the least squared error, with their mean in their place.

    Those are the k largest, for the k that maximises (their sum)^2 / k (Li et al. 2016).
    """
    ordered = magnitudes.sort(1, descending=True).values
    counts = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    best = (ordered.cumsum(1, dtype=torch.float64).square() / counts).argmax(1, keepdim=True)
    return (magnitudes >= ordered.gather(1, best)) & (magnitudes > 0)


class Thresholded(Projection):
    """-a, 0 or a, with a the mean of the magnitudes in a unit that are kept (Li et al. 2016).

    The gradient of a real weight is that of its quantized one.
    """

    def __init__(self, units: Units, exactly: bool) -> None:
        super().__init__()
        self.units = units
        self.exactly = exactly

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight."""
        split = self.units.split(weight.detach())
        magnitudes = split.abs()
        kept = exact(magnitudes) if self.exactly else approximate(magnitudes)
        total = torch.where(kept, magnitudes, 0).sum(1, keepdim=True)
        scale = round_step(total / kept.sum(1, keepdim=True).clamp(min=1))
        quantized = torch.where(kept, split.sign() * scale, 0)
        return with_gradient(self.units.join(quantized).to(weight.dtype), weight)


class TrainedTernary(Projection):
    """-n, 0 or p, both learned, of real weights whose largest magnitude is 1 at the start (Zhu et al. 2017).

    Their gradients are eq. 7, with the sign that the formula for n lacks, since the quantized weight is -n there. That
    of a real weight, eq. 8, is that of its quantized one times p beyond the threshold, n on the other side, and 1
    between.

    p and n are learned as factors on the values they begin with, the mean magnitudes of what they stand for, so that
    the updates of Adam, whose size is the learning rate, become shares of them. SGD moves each by the mean of eq. 7
    over the weights it stood for at the start, not the sum, which at rates that suit weights makes training diverge.
    """

    first: torch.Tensor
    counts: torch.Tensor

    def __init__(self, weight: torch.Tensor, share: float) -> None:
        super().__init__()
        self.share = share
        values = wide(weight)
        threshold = share * values.abs().max()
        sides = [side for side in (values[values > threshold], -values[values < -threshold]) if side.numel()]
        # a side without weights may get some: it begins as the other
        sides = [sides[0], sides[-1]]
        self.register_buffer("first", torch.stack([side.mean() for side in sides]))
        self.register_buffer("counts", values.new_tensor([side.numel() for side in sides]))
        self.factor = nn.Parameter(torch.ones_like(self.first))

    def start(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights over the largest magnitude."""
        return weight / weight.abs().max()

    @property
    def scales(self) -> torch.Tensor:
        """The values p and n, `(2,)`."""
        # one update too large must not turn the signs
        value = self.first * self.factor.detach().clamp(min=0.01)
        return with_gradient(value, self.factor / (self.first * self.counts))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight."""
        values, (positive, negative) = wide(weight), self.scales
        threshold = self.share * values.detach().abs().max()
        above, below = values > threshold, values < -threshold
        quantized = torch.where(above, positive, torch.where(below, -negative, 0.0))
        slope = torch.where(above, positive, torch.where(below, negative, 1.0)).detach()
        return with_gradient(quantized, values * slope).to(weight.dtype)
