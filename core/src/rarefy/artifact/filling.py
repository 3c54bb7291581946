"""Tensors out of a model and into a skeleton."""

from __future__ import annotations

import torch
from torch import nn

from rarefy.errors import ArtifactError
from rarefy.modules.construction import find, set_tensor, tensor_of, tie
from rarefy.modules.kinds import kind_of
from rarefy.modules.skeleton import state

ALIGNMENT = 64
"""Bytes at whose multiples tensors of torch start on a CPU; elsewhere kernels may be slower and round otherwise."""


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name, each once, non-persistent buffers included."""
    seen: set[int] = set()
    found = {}
    for name, tensor in state(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], ties: dict[str, str]) -> None:
    """Put `tensors` into a skeleton; raise `ArtifactError` unless they fit it and leave nothing without values."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = find(model, path)
        old = tensor_of(owner, leaf)
        if old is not None and kind_of(owner) is not None and old.shape != tensor.shape:
            raise ArtifactError(
                f"tensor {name!r} has the shape {tuple(tensor.shape)} in the file and {tuple(old.shape)} in the base; "
                "give the base that the file was written with"
            )
        if tensor.data_ptr() % ALIGNMENT:
            tensor = tensor.clone()
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
        set_tensor(owner, leaf, tensor, name)
    tie(model, ties)
    if empty := [name for name, tensor in state(model) if tensor.is_meta]:
        raise ArtifactError(f"the base has tensors that the file lacks: {', '.join(empty[:5])}; is it the right base?")
