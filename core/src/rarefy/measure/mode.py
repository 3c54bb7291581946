"""The state a model is measured in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


@contextlib.contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def move(inputs: tuple[Any, ...], device: torch.device | str) -> tuple[Any, ...]:
    """Return nested inputs with their tensors on `device`."""
    moved: tuple[Any, ...] = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, inputs)
    return moved


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU when there is none."""
    first = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device
