"""Layers that take the signs of their inputs."""

from __future__ import annotations

import torch
from rarefy.modules import register_module
from torch import nn
from torch.nn import functional as F

from rarefy_quantization.low_bit.signs import signs
from rarefy_quantization.parametrizations import with_gradient


def binarized(x: torch.Tensor) -> torch.Tensor:
    """Return the signs of inputs, 1 for zero, with the gradient of clipping to [-1, 1] (Hubara et al. 2016, eq. 4)."""
    return with_gradient(signs(x.detach()), x.clamp(-1, 1))


@register_module
class SignLinear(nn.Linear):
    """A linear layer of the signs of its inputs, times the mean magnitude of each input vector with `input_scale`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        input_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.input_scale = input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(..., out_features)` for `(..., in_features)`."""
        y = F.linear(binarized(x), self.weight)
        if self.input_scale:
            y = y * x.abs().mean(-1, keepdim=True)
        return y if self.bias is None else y + self.bias


@register_module
class SignConv2d(nn.Conv2d):
    """A convolution of the signs of its inputs, times the map K with `input_scale`; arguments as of `nn.Conv2d`.

    K = A * k, where A is the mean magnitude over the channels (of a group) at each place and k the box filter
    1 / (kh kw), with the stride, padding and dilation of the layer (Rastegari et al. 2016, section 3.2). What is padded
    is 0, as sign and as magnitude.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        input_scale: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *sizes, groups, bias, device=device, dtype=dtype)
        self.input_scale = input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(n, out, h', w')` for `(n, in, h, w)`."""
        y = F.conv2d(binarized(x), self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        if self.input_scale:
            y = y * self.scales(x).repeat_interleave(self.out_channels // self.groups, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def scales(self, x: torch.Tensor) -> torch.Tensor:
        """Return K, `(n, groups, h', w')`."""
        magnitudes = x.abs().unflatten(1, (self.groups, -1)).mean(2)
        height, width = self.kernel_size
        box = x.new_full((self.groups, 1, height, width), 1 / (height * width))
        return F.conv2d(magnitudes, box, None, self.stride, self.padding, self.dilation, self.groups)
