"""Depthwise separable convolution, starting from the nearest one to a trained kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rarefy_filters.compact import CompactBlock, conv
from rarefy_filters.config import DepthwiseSeparableConfig


class DepthwiseSeparable(CompactBlock[DepthwiseSeparableConfig]):
    """`multiplier` filters kh x kw on each input channel, then 1 x 1 over all of them.

    The kernel `(out, in, kh, kw)` that the block stands for has, per input channel, a matrix `(out, kh * kw)` of rank
    `multiplier`; the best one is its truncated singular value decomposition.
    """

    def why_not(self, layer: nn.Conv2d) -> str | None:
        """Leave alone what is no dense convolution with a spatial kernel, or would not get smaller."""
        taps = layer.kernel_size[0] * layer.kernel_size[1]
        if layer.groups > 1:
            return f"it has {layer.groups} groups already"
        if taps == 1:
            return "its kernel is 1 x 1 already"
        m, out, norm = self.config.multiplier, layer.out_channels, 2 * self.config.batchnorm
        if m * (taps + out + norm) >= taps * out:
            return f"with {m} filters per channel it would not have fewer parameters or FLOPs"
        return None

    def build(self, layer: nn.Conv2d) -> nn.Sequential:
        """Return depthwise, perhaps normalization, and pointwise."""
        inner = layer.in_channels * self.config.multiplier
        depthwise = conv(
            layer, layer.in_channels, inner, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.in_channels, False, layer.padding_mode,
        )  # fmt: skip
        pointwise = conv(layer, inner, layer.out_channels, 1, bias=layer.bias is not None)
        norm = [nn.BatchNorm2d(inner).to(layer.weight)] if self.config.batchnorm else []
        return nn.Sequential(depthwise, *norm, pointwise)

    def fill_(self, block: Any, layer: nn.Conv2d) -> float:
        """Set the weights to the best approximation of the kernel."""
        depthwise, pointwise = block[0], block[-1]
        c, taps, m = layer.in_channels, layer.weight[0, 0].numel(), self.config.multiplier
        kernel = layer.weight.detach().double().permute(1, 0, 2, 3).reshape(c, layer.out_channels, taps)
        u, s, v = torch.linalg.svd(kernel, full_matrices=False)
        root = s[:, :m].sqrt()
        outer, inner = u[:, :, :m] * root.unsqueeze(1), root.unsqueeze(2) * v[:, :m]
        _set(depthwise, inner.reshape(depthwise.weight.shape), layer)
        _set(pointwise, outer.permute(1, 0, 2).reshape(pointwise.weight.shape), layer)
        pointwise.bias = layer.bias
        lost = s[:, m:].square().sum() / s.square().sum().clamp(min=1e-300)
        return float(lost.sqrt())


def _set(module: nn.Conv2d, value: torch.Tensor, layer: nn.Conv2d) -> None:
    module.weight = nn.Parameter(value.to(module.weight.dtype).contiguous(), layer.weight.requires_grad)
