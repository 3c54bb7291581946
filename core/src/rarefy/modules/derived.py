"""Layers that work their weight out at each call, from shared values or codes, and the way to torch's own layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rarefy.modules.convolution import convolve


class DerivedWeight(nn.Module):
    """A layer whose `weight` is a property; one of the forms below says what is done with it."""

    bias: nn.Parameter | None

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight that is stood for, with its gradient."""
        raise NotImplementedError

    def torch_layer(self) -> Any:
        """Return torch's layer of the same shape, without values."""
        raise NotImplementedError

    @torch.no_grad()
    def plain(self) -> Any:
        """Return torch's layer with the weight that is stood for, and a bias of its own."""
        layer = self.torch_layer()
        layer.weight = nn.Parameter(self.weight.clone())
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        layer.train(self.training)
        return layer


class DerivedLinear(DerivedWeight):
    """What makes a linear layer of a weight `(out, in)`."""

    in_features: int
    out_features: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(..., out_features)` for `(..., in_features)`."""
        return F.linear(x, self.weight, self.bias)

    def torch_layer(self) -> Any:
        """Return a `torch.nn.Linear`."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")


class DerivedConvolution(DerivedWeight):
    """What makes a convolution of a weight `(out, in / groups, *kernel)`; attributes as of `torch.nn.Conv2d`."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(n, out, ...)` for `(n, in, ...)`, with as many dimensions as the kernel has behind these."""
        return convolve(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        )

    def torch_layer(self) -> Any:
        """Return a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`."""
        kinds: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return kinds[len(self.kernel_size) - 1](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )


def plain(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with torch's own layers in the place of those that work their weight out at each call.

    It computes the same, is as fast and as large in memory as before the weights were shared, and a file of it is
    large again. Layers that shared what they store share their weight. Other models come back as mere copies.
    """
    from rarefy.technique import replace_

    model = copy.deepcopy(model)
    if isinstance(model, DerivedWeight):
        return model.plain()  # type: ignore[no-any-return]
    made: dict[tuple[int, ...], Any] = {}
    for layer in [module for module in model.modules() if isinstance(module, DerivedWeight)]:
        new = layer.plain()
        stored = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        twin = made.setdefault(tuple(id(tensor) for name, tensor in stored if name != "bias"), new)
        if torch.equal(twin.weight, new.weight):
            new.weight = twin.weight
        replace_(model, layer, new)
    return model
