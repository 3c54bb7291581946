"""placeholder"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rarefy_schemas import ModelReference
from torch import nn


@dataclass(frozen=True)
class Base:
    """The skeleton a compressed model is described against."""

    build: Callable[[], nn.Module]
    """Returns a fresh, unweighted skeleton; it may be called under `torch.device("meta")`."""
    reference: ModelReference | None = None
    """How another process builds the skeleton; None when it is the caller's own object."""
