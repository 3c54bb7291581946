"""Layers of other widths, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class Resized:
    """A layer of other widths, and the width of its input."""

    layer: nn.Module
    width: int
    axis: int
    """Axis of the input along which it is that wide."""


def resized(layer: nn.Module, sizes: tuple[int, ...]) -> Resized | None:
    """Return a layer like `layer` whose weight has other sizes; None for kinds not known here."""
    build = _KINDS.get(type(layer))
    with torch.random.fork_rng(devices=[]):
        made = build(layer, sizes) if build is not None else None
    if made is not None:
        made.layer.to(layer.weight.device, layer.weight.dtype).eval()  # type: ignore[union-attr, arg-type]
    return made


def _linear(layer: Any, sizes: tuple[int, ...]) -> Resized:
    out, into = sizes
    return Resized(nn.Linear(into, out, layer.bias is not None), into, -1)


def _convolution(layer: Any, sizes: tuple[int, ...]) -> Resized | None:
    out, into = (sizes[1], sizes[0]) if layer.transposed else (sizes[0], sizes[1])
    groups = 1
    if layer.groups > 1:
        if layer.groups != layer.in_channels:
            return None
        # depthwise: the width shows in the dimension that is not 1 per group
        per_input = layer.out_channels // layer.groups
        into = groups = sizes[0] if layer.transposed else sizes[0] // per_input
        out = into * per_input
    options = {"output_padding": layer.output_padding} if layer.transposed else {}
    made = type(layer)(
        into,
        out,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        **options,
    )
    return Resized(made, into, 1 - layer.weight.dim())


def _batch_norm(layer: Any, sizes: tuple[int, ...]) -> Resized:
    return Resized(type(layer)(sizes[0], track_running_stats=layer.track_running_stats), sizes[0], 1)


def _layer_norm(layer: Any, sizes: tuple[int, ...]) -> Resized | None:
    return Resized(nn.LayerNorm(sizes[0], bias=layer.bias is not None), sizes[0], -1) if len(sizes) == 1 else None


_CONVOLUTIONS: tuple[type[_ConvNd], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_BATCH_NORMS: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KINDS: dict[type[nn.Module], Callable[[Any, tuple[int, ...]], Resized | None]] = {
    nn.Linear: _linear,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    **dict.fromkeys(_BATCH_NORMS, _batch_norm),
    nn.LayerNorm: _layer_norm,
}
