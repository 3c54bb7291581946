"""Real weights that training keeps behind quantized ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rarefy.technique import TrainingRule
from torch import nn
from torch.nn.utils import parametrize

from rarefy_quantization.parametrizations import computed, places


class Projection(nn.Module):
    """Parametrization of a weight by a few values; what it computes in evaluation mode is what is left of training."""

    def start(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the real weights that training starts from, given the layer's."""
        return weight

    def observe(self, gradient: torch.Tensor) -> None:
        """Look at the gradient of the real weights before each optimizer step."""

    def confine_(self, latent: torch.Tensor) -> None:
        """Bring the real weights back to where they may be, after each optimizer step."""


class Clipped(Projection):
    """Projection of real weights that stay between -limit and limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def start(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weights, clipped."""
        return weight.clamp(-self.limit, self.limit)

    def confine_(self, latent: torch.Tensor) -> None:
        """Clip the real weights."""
        latent.clamp_(-self.limit, self.limit)


class LatentRule(TrainingRule):
    """Shows every projection its gradients and confines its weights."""

    def before_step(self, model: nn.Module) -> None:
        """Show the gradients; those that overflow do not count, as the optimizer leaves their step out."""
        for projection, latent in _projections(model):
            if latent.grad is not None and torch.isfinite(latent.grad).all():
                projection.observe(latent.grad)

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        """Confine the weights."""
        for projection, latent in _projections(model):
            projection.confine_(latent)


@torch.no_grad()
def project_(model: nn.Module, parameter: nn.Parameter, projection: Projection) -> None:
    """Have every layer that uses a parameter compute with its projection."""
    for own in projection.parameters():
        own.requires_grad_(parameter.requires_grad)
    parameter.copy_(projection.start(parameter))
    for layer, name in places(model, parameter):
        parametrize.register_parametrization(layer, name, projection)


def wide(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight in at least single precision."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _projections(model: nn.Module) -> Iterator[tuple[Projection, nn.Parameter]]:
    """Yield each projection once, with its real weights."""
    found = {steps.original: steps[0] for layer in model.modules() for steps in computed(layer, Projection).values()}
    for latent, projection in found.items():
        yield projection, latent
