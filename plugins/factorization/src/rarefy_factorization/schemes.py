"""Ways in which a layer's weight is one matrix per group, and in which two factors are two layers.

For left factors `(groups, rows, rank)` and right factors `(groups, rank, columns)` the two layers in sequence compute
exactly what the layer would with the product as its weight: stride, padding, dilation, groups and bias included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LinearScheme:
    """`(out, in)` is the matrix itself."""

    def unfold(self, layer: nn.Linear) -> torch.Tensor:
        """Return `(1, out, in)`."""
        return layer.weight.unsqueeze(0)

    def build(self, layer: nn.Linear, left: torch.Tensor, right: torch.Tensor) -> nn.Sequential:
        """Return `in -> rank -> out`."""
        rank = right.shape[1]
        first = _empty(layer, nn.Linear, layer.in_features, rank, bias=False)
        second = _empty(layer, nn.Linear, rank, layer.out_features, bias=layer.bias is not None)
        return _filled(layer, first, second, right[0], left[0])

    def flops(self, layer: nn.Linear, rank: int) -> float:
        """Return the work of the factors as a share of the layer's."""
        return rank * (layer.in_features + layer.out_features) / layer.weight.numel()


class ChannelScheme:
    """`(out, in * kh * kw)` of each group: a full kernel to `rank` channels, then 1 x 1."""

    def unfold(self, layer: nn.Conv2d) -> torch.Tensor:
        """Return `(groups, out, in * kh * kw)`, the channels counted within a group."""
        return layer.weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)

    def build(self, layer: nn.Conv2d, left: torch.Tensor, right: torch.Tensor) -> nn.Sequential:
        """Return the two convolutions."""
        groups, rank, _ = right.shape
        kind, ones = type(layer), (1,) * len(layer.kernel_size)
        first = _empty(
            layer, kind, layer.in_channels, groups * rank, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, groups, False, layer.padding_mode,
        )  # fmt: skip
        second = _empty(
            layer, kind, groups * rank, layer.out_channels, ones, groups=groups, bias=layer.bias is not None
        )
        return _filled(layer, first, second, right, left)

    def flops(self, layer: nn.Conv2d, rank: int) -> float:
        """Return the work of the factors as a share of the layer's, about."""
        _, rows, columns = self.unfold(layer).shape
        return rank * (rows + columns) / (rows * columns)


class SpatialScheme:
    """`(in * kh, out * kw)` of each group: kh x 1 to `rank` channels, then 1 x kw (Tai et al. 2016, section 3)."""

    def unfold(self, layer: nn.Conv2d) -> torch.Tensor:
        """Return `(groups, out * kw, in * kh)`, the channels counted within a group."""
        n, (_, c, kh, kw) = layer.out_channels // layer.groups, layer.weight.shape
        kernel = layer.weight.reshape(layer.groups, n, c, kh, kw)
        return kernel.permute(0, 1, 4, 2, 3).reshape(layer.groups, n * kw, c * kh)

    def build(self, layer: nn.Conv2d, left: torch.Tensor, right: torch.Tensor) -> nn.Sequential:
        """Return the vertical and the horizontal convolution."""
        groups, rank, _ = right.shape
        (kh, kw), (sh, sw), (dh, dw), padding = layer.kernel_size, layer.stride, layer.dilation, layer.padding
        tall, wide = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        rest = {"groups": groups, "padding_mode": layer.padding_mode}
        first = _empty(
            layer, nn.Conv2d, layer.in_channels, groups * rank, (kh, 1), (sh, 1), tall, (dh, 1), bias=False, **rest
        )
        second = _empty(
            layer, nn.Conv2d, groups * rank, layer.out_channels, (1, kw), (1, sw), wide, (1, dw),
            bias=layer.bias is not None, **rest,
        )  # fmt: skip
        horizontal = left.reshape(groups, -1, kw, rank).transpose(2, 3)
        return _filled(layer, first, second, right, horizontal)

    def flops(self, layer: nn.Conv2d, rank: int) -> float:
        """Return the work of the factors as a share of the layer's; the first runs before the horizontal stride."""
        _, rows, columns = self.unfold(layer).shape
        return (
            rank * (rows + columns * layer.stride[1]) / layer.weight[0].numel() / (layer.out_channels // layer.groups)
        )


Scheme = LinearScheme | ChannelScheme | SpatialScheme


def _empty(layer: nn.Module, kind: type[nn.Module], *arguments: Any, **options: Any) -> Any:
    weight = layer.get_parameter("weight")
    return torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        kind, *arguments, device=weight.device, dtype=weight.dtype, **options
    )


def _filled(layer: Any, first: Any, second: Any, inner: torch.Tensor, outer: torch.Tensor) -> nn.Sequential:
    for module, value in ((first, inner), (second, outer)):
        module.weight = nn.Parameter(
            value.reshape(module.weight.shape).to(module.weight.dtype).clone(memory_format=torch.contiguous_format),
            requires_grad=layer.weight.requires_grad,
        )
    second.bias = layer.bias
    return nn.Sequential(first, second)
