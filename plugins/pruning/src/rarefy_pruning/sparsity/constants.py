"""Channels that carry a constant: what their readers get of it, and how that goes into the readers' biases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rarefy.measure.mode import evaluation
from torch import nn

TOLERANCE = 1e-5
"""Largest spread, relative to 1 + |mean|, of what counts as constant; kernels round by position."""


@contextlib.contextmanager
def zeroed(*tensors: torch.Tensor) -> Iterator[None]:
    """Set tensors to zero for a while."""
    with torch.no_grad():
        values = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        yield
        for tensor, before in zip(tensors, values, strict=True):
            tensor.copy_(before)


@dataclass(frozen=True)
class Signal:
    """What a layer reads in each of its input channels."""

    mean: torch.Tensor
    """Mean over samples and positions, `(in,)`."""
    constant: torch.Tensor
    """Whether it is the same at every position of every sample, `(in,)`."""
    fixed: torch.Tensor
    """Whether it is the same in every sample, though perhaps not at every position, `(in,)`."""


def signals(model: nn.Module, inputs: tuple[Any, ...], names: Iterable[str]) -> dict[str, Signal]:
    """Run `model` in evaluation mode and return what the linear and convolution layers called `names` read."""
    calls: dict[str, list[Signal]] = {name: [] for name in names}
    hooks = []
    for name, found in calls.items():

        def note(layer: nn.Module, args: tuple[Any, ...], found: list[Signal] = found) -> None:
            channel = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
            found.append(_signal(args[0].movedim(channel, 0)))

        hooks.append(model.get_submodule(name).register_forward_pre_hook(note))
    try:
        with torch.no_grad(), evaluation(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _together(found) for name, found in calls.items() if found}


def _signal(values: torch.Tensor) -> Signal:
    """Summarize values `(in, samples, ...)`."""
    values = values.float().reshape(*values.shape[:2], -1)
    mean, allowed = values.mean((1, 2)), _allowed(values.mean((1, 2)))
    return Signal(mean, _spread(values.flatten(1), 1) <= allowed, _spread(values, 1).amax(1) <= allowed)


def _together(calls: list[Signal]) -> Signal:
    """Summarize what a layer reads that is called several times."""
    means = torch.stack([call.mean for call in calls])
    mean = means.mean(0)
    constant = torch.stack([call.constant for call in calls]).all(0) & (_spread(means, 0) <= _allowed(mean))
    return Signal(mean, constant, torch.stack([call.fixed for call in calls]).all(0))


def _spread(values: torch.Tensor, dim: int) -> torch.Tensor:
    return values.amax(dim) - values.amin(dim)


def _allowed(mean: torch.Tensor) -> torch.Tensor:
    return TOLERANCE * (1 + mean.abs())


def pads_with_zeros(layer: nn.Module) -> bool:
    """Tell whether a layer reads zeros beside its input, where a constant input would not be constant."""
    padding = getattr(layer, "padding", ())
    padded = padding == "same" if isinstance(padding, str) else any(padding)
    return padded and layer.padding_mode == "zeros"


@torch.no_grad()
def absorb_(model: nn.Module, found: Mapping[str, Signal], positions: Mapping[str, torch.Tensor]) -> bool:
    """Add to the biases of layers what their input channels at `positions` contribute on average.

    With constant channels and no padding by zeros, the layer then computes without them what it did with them; beside
    a border padded with zeros it is off by what the kernel reads there. A layer without a bias gets one; returns
    whether that happened.
    """
    added = False
    for name, where in positions.items():
        layer, mean = model.get_submodule(name), found[name].mean[where]
        if not mean.any():
            continue
        read = layer.weight[:, where].flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight[:, where]
        shift = (read.to(mean) @ mean).to(layer.weight)
        if layer.bias is None:
            layer.bias, added = nn.Parameter(shift), True
        else:
            layer.bias += shift
    return added
