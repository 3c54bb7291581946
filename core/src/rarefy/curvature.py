"""The diagonal of the loss's Hessian in the weights, by products with the Hessian (no squared gradients).

For a linear layer that sees each sample once, d2L/dw_ij^2 = d2L/da_i^2 x_j^2 per sample, where a = W x + b (LeCun et
al. 1989, eq. 6), and the samples do not touch each other; so one product gives a row of d2L/da^2 for all samples, and
as many as there are outputs give the exact diagonal. Other layers use their weights at many places whose mixed
derivatives count as well; there the products are with the Hessian in the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.errors import StageError
from rarefy.gradients import add_, differentiable, labelled, loss_of
from rarefy.task import Task
from rarefy.weights import LayerWeight


def second_derivatives(
    model: nn.Module, weights: Sequence[LayerWeight], task: Task, batches: int, probes: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return d2L/dw^2 per weight, mean over the samples of some batches, for each layer that has an effect.

    It is exact where `probes` products suffice, else an estimate without bias (Hutchinson, with random signs).
    Raises `StageError` when the model cannot be differentiated twice, or its loss is linear in a layer.
    """
    found: dict[str, torch.Tensor] = {}
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    products = _Products(probes, torch.Generator().manual_seed(seed))
    # fused attention has no second derivative
    with differentiable(model, [w.parameter for w in weights]), sdpa_kernel(SDPBackend.MATH):
        for share, batch in labelled(task, batches):
            for weight in weights:
                calls, loss = _tapped_loss(model, weight.layer, task, batch)
                alone = owners[weight.parameter] == 1 and _once_per_sample(weight, calls, len(task.labels(batch)))
                try:
                    diagonal = products.in_weights(loss, weight.parameter, calls[0] if alone else None)
                except RuntimeError as error:
                    raise StageError(
                        f"the loss cannot be differentiated twice in {weight.name!r}: {error}. Leave the layer out "
                        "with `targets.exclude`, or take a criterion that needs less"
                    ) from error
                if diagonal is not None:
                    add_(found, weight.name, share * diagonal)
    return found


@dataclass(frozen=True)
class _Call:
    inputs: torch.Tensor
    outputs: torch.Tensor
    """A zero that was added to the outputs, to differentiate by."""


def _tapped_loss(model: nn.Module, layer: nn.Module, task: Task, batch: Any) -> tuple[list[_Call], torch.Tensor]:
    """Return the calls of a layer and the loss of a batch."""
    calls: list[_Call] = []

    def tap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        # a sum, so that what changes the output in place later does not change the place of the derivative
        added = torch.zeros_like(output, requires_grad=True)
        calls.append(_Call(args[0] if args else kwargs["input"], added))
        return output + added

    handle = layer.register_forward_hook(tap, with_kwargs=True)
    try:
        return calls, loss_of(model, task, batch)
    finally:
        handle.remove()


def _once_per_sample(weight: LayerWeight, calls: Sequence[_Call], samples: int) -> bool:
    return isinstance(weight.layer, nn.Linear) and len(calls) == 1 and calls[0].inputs.shape[:-1] == (samples,)


@dataclass(frozen=True)
class _Products:
    """Products with the Hessian, so many at most."""

    most: int
    generator: torch.Generator

    def in_weights(self, loss: torch.Tensor, weight: torch.Tensor, call: _Call | None) -> torch.Tensor | None:
        """Return d2L/dw^2, through the outputs of a call that sees each sample once; None when w has no effect."""
        if call is None:
            return self.diagonal(loss, weight, weight.shape)
        curvature = self.diagonal(loss, call.outputs, call.outputs.shape[1:])
        return None if curvature is None else curvature.float().T @ call.inputs.detach().float().square()

    def diagonal(self, loss: torch.Tensor, place: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """Return d2L/dp^2 at each element of `place`, whose leading dimensions beyond `shape` are separate samples."""
        (gradient,) = torch.autograd.grad(loss, place, create_graph=True, allow_unused=True)
        if gradient is None:
            return None
        diagonal = torch.zeros_like(place)
        for vector, factor in self.vectors(place, shape):
            (product,) = torch.autograd.grad(gradient, place, vector, retain_graph=True)
            diagonal += factor * vector * product
        return diagonal.detach()

    def vectors(self, place: torch.Tensor, shape: torch.Size) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield v and c with diag H = E sum c v (H v): the unit vectors of `shape`, or random signs when too many."""
        size = shape.numel()
        if size <= self.most:
            for unit in torch.eye(size, dtype=place.dtype, device=place.device):
                yield unit.view(shape).expand_as(place), 1.0
        else:
            for _ in range(self.most):
                signs = torch.randint(0, 2, place.shape, generator=self.generator) * 2 - 1
                yield signs.to(place), 1 / self.most
