"""Structures as slices of tensors, their norms and the proximal operator of a sum of norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]

EPSILON = 1e-12
"""Added to a squared norm before its root is differentiated, so that the gradient at zero is zero."""


@dataclass(frozen=True, eq=False)
class Slices:
    """What belongs to each structure in one tensor."""

    tensor: str
    """Name of the parameter."""
    dims: tuple[int, ...]
    """The dimensions that are divided, ascending."""
    indices: torch.Tensor
    """Positions in the flattened `dims`, `(structures, positions per structure)`, int64; none in two structures."""


@dataclass(frozen=True, eq=False)
class Structures:
    """Structures of one kind, each with its slices of one or more tensors."""

    name: str
    """What they are structures of, a layer or a group."""
    slices: tuple[Slices, ...]

    def __len__(self) -> int:
        """Return the number of structures."""
        return len(self.slices[0].indices)

    def sizes(self, tensors: Tensors) -> torch.Tensor:
        """Return the number of weights in each structure, `(structures,)`."""
        sizes = torch.zeros(len(self))
        for part in self.slices:
            tensor = tensors[part.tensor]
            sizes += part.indices.shape[1] * tensor.numel() // math.prod(_divided(tensor, part))
        return sizes


def squared_norms(structures: Structures, tensors: Tensors) -> torch.Tensor:
    """Return the squared norm of each structure over all its slices, `(structures,)`, in single precision or better."""
    total = torch.zeros(())
    for part in structures.slices:
        tensor = tensors[part.tensor]
        others = [dim for dim in range(tensor.dim()) if dim not in part.dims]
        squares = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()
        squares = squares.sum(others) if others else squares
        total = total.to(tensor.device) + squares.flatten()[part.indices.to(tensor.device)].sum(1)
    return total


def norms(structures: Structures, tensors: Tensors) -> torch.Tensor:
    """Return the norm of each structure, `(structures,)`; its gradient is finite at zero too."""
    squares = squared_norms(structures, tensors)
    return (squares + EPSILON).sqrt() if squares.requires_grad else squares.sqrt()


def shrunk(norms: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Return the factors `max(0, 1 - threshold / norm)` of the proximal operator of `sum_g threshold_g ||theta_g||`.

    Zhou et al. 2016, Less is more; for structures of one weight it is the soft threshold.
    """
    return torch.where(norms > thresholds, 1 - thresholds / norms, 0)


@torch.no_grad()
def scale_(structures: Structures, tensors: Tensors, factors: torch.Tensor) -> None:
    """Multiply each structure by its factor in place."""
    for part in structures.slices:
        tensor = tensors[part.tensor]
        divided = _divided(tensor, part)
        scale = torch.ones(math.prod(divided), dtype=tensor.dtype, device=tensor.device)
        scale[part.indices.to(tensor.device)] = factors.to(scale)[:, None]
        shape = [size if dim in part.dims else 1 for dim, size in enumerate(tensor.shape)]
        tensor.mul_(scale.view(shape))


def _divided(tensor: torch.Tensor, part: Slices) -> list[int]:
    return [tensor.shape[dim] for dim in part.dims]
