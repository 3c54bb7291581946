"""Bases and their skeletons: a network's structure without its values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rarefy_schemas import ModelReference
from torch import nn
from torch.nn.parameter import is_lazy

from rarefy.errors import ArtifactError


@dataclass(frozen=True)
class Base:
    """The skeleton a compressed model is described against."""

    build: Callable[[], nn.Module]
    """Returns a fresh, unweighted skeleton; it may be called under `torch.device("meta")`."""
    reference: ModelReference | None = None
    """How another process builds the skeleton; None when it is the caller's own object."""


def as_base(base: Base | nn.Module | Callable[[], nn.Module]) -> Base:
    """Return `base` as a `Base`, given one, a module of the right structure, or a function that builds it."""
    if isinstance(base, Base):
        return base
    if isinstance(base, nn.Module):
        return Base(lambda: base)
    return Base(base)


def skeleton(base: Base) -> nn.Module:
    """Return a fresh copy of the base whose parameters and buffers are on the meta device.

    The builder runs on the meta device; one that cannot, because it computes with values, runs on the CPU instead.
    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = base.build()
            if isinstance(model, nn.Module) and not _valueless(model):
                return meta_copy(model)
        except Exception:  # whatever a builder cannot do on the meta device, it may do on the CPU
            pass
        model = base.build()
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"the base must be a torch module or return one; it returned {type(model).__name__}")
    return meta_copy(model)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy with parameters and buffers on the meta device, without copying their values."""
    memo: dict[int, Any] = {}
    for name, tensor in state(model):
        if is_lazy(tensor):
            raise ArtifactError(f"{name!r} has no shape yet; run the model once on example inputs")
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters, then all buffers, non-persistent ones and repeated ones included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _valueless(model: nn.Module) -> bool:
    """Tell whether a tensor that is neither parameter nor buffer lost its values to the meta device."""
    known = {id(tensor) for _, tensor in state(model)}
    for module in model.modules():
        for value in vars(module).values():
            items = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
            if any(isinstance(item, torch.Tensor) and item.is_meta and id(item) not in known for item in items):
                return True
    return False
