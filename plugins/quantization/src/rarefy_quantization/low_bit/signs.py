"""Weights of two values: their signs times a scale."""

from __future__ import annotations

import math

import torch
from torch import nn

from rarefy_quantization.grids import Units, round_step
from rarefy_quantization.low_bit.projection import Clipped, Projection, wide
from rarefy_quantization.parametrizations import with_gradient

SECOND_MOMENT_DECAY = 0.999
EPSILON = 1e-8


def signs(weight: torch.Tensor) -> torch.Tensor:
    """Return 1 for weights from zero up and -1 for the others."""
    return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)


class ConnectedSigns(Clipped):
    """Signs times a constant h, of real weights between -h and h (Courbariaux et al. 2015, eq. 1 to 3, algorithm 1).

    With h = 1 it is the paper's text, with Glorot's constant the same network on another scale: there the paper
    multiplies learning rates by one over this constant, so that Adam's updates are alike.
    """

    def __init__(self, limit: float, stochastic: bool) -> None:
        super().__init__(limit)
        self.stochastic = stochastic

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight; in training mode with signs that are drawn, where asked for."""
        values = wide(weight.detach())
        if self.stochastic and self.training:
            # from the generator that dropout draws from, which the training seeds
            values = (values / self.limit + 1) / 2 - torch.rand_like(values)
        return with_gradient((signs(values) * self.limit).to(weight.dtype), weight)


class ScaledSigns(Projection):
    """Signs times the mean magnitude of a unit: the best fit by two values (Rastegari et al. 2016, eq. 6).

    The gradient of a real weight is that of its quantized one, or with `scaled` that times 1/n + scale * 1[|w| <= 1],
    as eq. 12 of the paper has it; the chain rule would make the first term a sum over all weights of the unit.
    """

    def __init__(self, units: Units, scaled: bool = False) -> None:
        super().__init__()
        self.units = units
        self.scaled = scaled

    def scale(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Return the scale, `(units, 1)`, of magnitudes `(units, size)`."""
        return magnitudes.mean(1, keepdim=True)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight."""
        split = self.units.split(weight.detach())
        scale = round_step(self.scale(split.abs()))
        quantized = self.units.join(signs(split) * scale).to(weight.dtype)
        if not self.scaled:
            return with_gradient(quantized, weight)
        slope = 1 / self.units.size + scale * (split.abs() <= 1)
        return with_gradient(quantized, weight * self.units.join(slope).to(weight.dtype))


class LossAwareSigns(ScaledSigns):
    """Signs times the mean magnitude weighted by d, the estimated curvature (Hou et al. 2017, proposition 3.1).

    That is the proximal step of a Newton method with a diagonal Hessian d, the root of Adam's second moment. It is
    followed here from the gradients, bit by bit as Adam does it, whatever the optimizer; before the first one d is
    constant. As in BinaryConnect and the authors' program, the optimizer moves the real weights from where they were.
    """

    second: torch.Tensor
    steps: torch.Tensor

    def __init__(self, units: Units, like: torch.Tensor) -> None:
        super().__init__(units)
        self.register_buffer("second", torch.zeros_like(wide(like)))
        self.register_buffer("steps", torch.zeros((), device=like.device))

    def observe(self, gradient: torch.Tensor) -> None:
        """Update the second moment."""
        squares = wide(gradient)
        self.second.mul_(SECOND_MOMENT_DECAY).addcmul_(squares, squares, value=1 - SECOND_MOMENT_DECAY)
        self.steps += 1

    def curvature(self) -> torch.Tensor:
        """Return d, in the shape of the weight."""
        first = 1 - SECOND_MOMENT_DECAY
        return (self.second / (1 - SECOND_MOMENT_DECAY**self.steps).clamp(min=first)).sqrt() + EPSILON

    def scale(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Return ||d w||_1 / ||d||_1."""
        d = self.units.split(self.curvature())
        return (d * magnitudes).sum(1, keepdim=True) / d.sum(1, keepdim=True)


def glorot(layer: nn.Module, shape: torch.Size) -> float:
    """Return sqrt(1.5 / (inputs + outputs)) of a layer, kernel positions counted, with 16 significant bits."""
    positions = math.prod(shape[2:])
    outputs = shape[0] * positions / getattr(layer, "groups", 1)
    return float(round_step(torch.tensor(math.sqrt(1.5 / (math.prod(shape[1:]) + outputs)))))
