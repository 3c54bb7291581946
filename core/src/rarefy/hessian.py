"""The Hessian of a layer's output error, its inverse and the inverse's factor: one service for all who change weights.

The convention. A linear or convolution layer is seen as y = W x, with `W` of shape (groups, rows, columns): a row makes
one output channel, a column belongs to one input of that channel (for a convolution: input channel and kernel position,
in the order of `weight.flatten(1)`), and `x` runs over all samples and positions. When `W` changes by `D`, the squared
error of the outputs, mean over the N vectors x, is the sum over rows d of 1/2 d H d^T with

    H = 2/N sum x x^T    of shape (groups, columns, columns).

So the rows are independent problems that share the H of their group, and H does not depend on the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from rarefy.errors import StageError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes of layers that have such a Hessian."""
_WORKSPACE = 2**24
"""Largest number of elements that are unfolded at a time."""


def as_rows(layer: nn.Module) -> torch.Tensor:
    """Return the layer's weight as `(groups, out / groups, columns)`."""
    weight = _weight(layer)
    groups = _groups(layer)
    return weight.flatten(1).view(groups, weight.shape[0] // groups, -1)


def columns(layer: nn.Module) -> int:
    """Return the number of inputs of one output, kernel positions included: the order of the layer's Hessian."""
    return math.prod(_weight(layer).shape[1:])


def unfold(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the vectors x that the layer multiplies its rows with, `(groups, vectors, columns)`.

    They follow the layer's stride, padding, padding mode, dilation and groups.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return inputs.reshape(1, -1, columns(layer))
    spatial = len(layer.kernel_size)
    x = inputs if inputs.dim() == spatial + 2 else inputs.unsqueeze(0)
    x = F.pad(x, _padding(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (samples, channels, *positions, *kernel) -> (groups, samples, *positions, channels of a group, *kernel)
    x = torch.unflatten(x, 1, (layer.groups, -1)).movedim((1, 2), (0, 2 + spatial))
    return x.reshape(layer.groups, -1, columns(layer))


def vectors(layer: nn.Module, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the vectors of `unfold` a few samples at a time, as it multiplies the input by the size of the kernel."""
    kernel = getattr(layer, "kernel_size", ())
    parts: tuple[torch.Tensor, ...] = (inputs,)
    if kernel and inputs.dim() == len(kernel) + 2:
        one = inputs[:1].numel() * math.prod(kernel)
        parts = torch.split(inputs, max(1, _WORKSPACE // max(1, one)))
    for part in parts:
        x = unfold(layer, part)
        if x.shape[1]:
            yield x


class InputHessian:
    """Accumulates H = 2/N sum x x^T of one layer over the inputs it is shown, in memory of one H."""

    def __init__(self, layer: nn.Module, name: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Start empty, on the device of the weight; `name` is used in errors, `dtype` is that of H."""
        if not isinstance(layer, LAYERS):
            kinds = ", ".join(kind.__name__ for kind in LAYERS)
            raise StageError(f"{type(layer).__name__} {name!r} has no input Hessian; layers that have one are {kinds}")
        self.layer, self.name, self.seen = layer, name, 0
        shape = (_groups(layer), columns(layer), columns(layer))
        self.mean = torch.zeros(shape, dtype=dtype, device=layer.weight.device)

    @torch.no_grad()
    def update(self, inputs: torch.Tensor, user: nn.Module | None = None) -> None:
        """Take in one input of the layer, with any number of samples; or of `user`, a layer that shares its weight."""
        for x in vectors(user or self.layer, inputs.to(self.mean)):
            self.seen += x.shape[1]
            share = x.shape[1] / self.seen
            self.mean.baddbmm_(x.mT, x, beta=1 - share, alpha=2 / self.seen)

    @property
    def cross(self) -> torch.Tensor:
        """2/N sum x0 x^T with x0 the inputs that the layer should have had; those it has, unless `update_pair` told."""
        return self.value

    @property
    def value(self) -> torch.Tensor:
        """H, `(groups, columns, columns)`; raises `StageError` when no or no finite inputs were seen."""
        if self.seen == 0:
            raise StageError(f"the layer {self.name!r} has seen no inputs; calibrate with data that reaches it")
        if not torch.isfinite(self.mean).all():
            raise StageError(f"the inputs of the layer {self.name!r} are NaN, infinite or too large; check the data")
        return self.mean

    @property
    def dead(self) -> torch.Tensor:
        """Inputs that were zero in every vector, `(groups, columns)`: their weights have no effect on this data."""
        return self.value.diagonal(dim1=-2, dim2=-1) == 0

    def damped(self, share: float) -> torch.Tensor:
        """Return H with `share` of its mean diagonal added to the diagonal, per group, so that it can be inverted.

        Dead inputs get a millionth of the mean instead, whatever the share: they are tied to no other input, so this
        suffices, and makes their weights the cheapest to change. A group of dead inputs counts as having the mean 1.
        """
        diagonal = self.value.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        mean = torch.where(mean == 0, 1, mean)
        return self.value + torch.diag_embed(torch.where(self.dead, 1e-6 * mean, share * mean))

    def error(self, change: torch.Tensor) -> float:
        """Return the squared error of the outputs, mean over the vectors, that a change of the rows causes."""
        change = change.to(self.mean)
        return 0.5 * float(torch.einsum("gri,gij,grj->", change, self.value, change))


class PairedHessian(InputHessian):
    """Accumulates, beside H, the products with the inputs x0 that the layer had before those in front of it changed.

    Rows Q that give W x0 as nearly as they can on the inputs x minimise 1/2 Q H Q^T - Q K^T W^T, where K is `cross`.
    """

    def __init__(self, layer: nn.Module, name: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layer, name, dtype)
        self.products = torch.zeros_like(self.mean)

    @torch.no_grad()
    def update_pair(self, before: torch.Tensor, inputs: torch.Tensor, user: nn.Module | None = None) -> None:
        """Take in one input of the layer, or of `user`, and what it was before."""
        layer = user or self.layer
        for x0, x in zip(vectors(layer, before.to(self.mean)), vectors(layer, inputs.to(self.mean)), strict=True):
            self.seen += x.shape[1]
            share = x.shape[1] / self.seen
            self.mean.baddbmm_(x.mT, x, beta=1 - share, alpha=2 / self.seen)
            self.products.baddbmm_(x0.mT, x, beta=1 - share, alpha=2 / self.seen)

    @property
    def cross(self) -> torch.Tensor:
        """2/N sum x0 x^T, `(groups, columns, columns)`."""
        return self.products


def inverse(hessian: torch.Tensor, name: str = "a layer") -> torch.Tensor:
    """Return H^-1 of symmetric positive definite matrices `(..., n, n)`; raise `StageError` when they are not."""
    return torch.cholesky_inverse(_cholesky(hessian, name))


def inverse_factor(hessian: torch.Tensor, name: str = "a layer") -> torch.Tensor:
    """Return the upper triangular U with H^-1 = U^T U, for `(..., n, n)`; raise `StageError` when there is none.

    Its row j is [H_F^-1]_j / sqrt([H_F^-1]_jj) where F is j and all later inputs, so it holds every inverse that is
    needed when inputs are treated from the first to the last (Frantar et al. 2023, GPTQ, step 3).
    """
    # H = R R^T with R upper is the Cholesky factorization of H read from its last row to its first; then U = R^-1
    upper = _cholesky(hessian.flip(-2, -1), name).flip(-2, -1)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    factor: torch.Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor


def _cholesky(hessian: torch.Tensor, name: str) -> torch.Tensor:
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(hessian)
    if bool(info.any()):
        raise StageError(
            f"the input Hessian of {name} is not positive definite; raise `damping`, or calibrate with more batches"
        )
    return factor


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer.weight)


def _groups(layer: nn.Module) -> int:
    return cast(int, getattr(layer, "groups", 1))


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return the padding as `torch.nn.functional.pad` takes it: the last axis first, before and after."""
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sizes = cast(tuple[int, ...], layer.padding)
    return [size for size in reversed(sizes) for _ in range(2)]
