"""A tensor as codes and codebook, and as a trainable parametrization of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from rarefy_quantization.parametrizations import computed, places


def entropy(codes: torch.Tensor) -> float:
    """Return the order-0 entropy of integers in bits per entry."""
    shares = codes.flatten().unique(return_counts=True)[1].double() / codes.numel()
    return float(torch.special.entr(shares).sum() / math.log(2))


@dataclass(frozen=True)
class Coded:
    """A tensor whose entries are looked up in a codebook."""

    codes: torch.Tensor
    """uint8, in the tensor's shape."""
    codebook: torch.Tensor
    """(distinct values,), of the tensor's type."""
    zeros: bool
    """Whether code 0 stands for the zeros of the tensor, which stay."""

    def decode(self) -> torch.Tensor:
        """Return the tensor."""
        return self.codebook[self.codes.long()]

    def lookup(self) -> Lookup:
        """Return the parametrization of a tensor by its codebook."""
        return Shared(self)

    def entropy(self) -> float:
        """Return the order-0 entropy of the codes in bits per entry."""
        return entropy(self.codes)


class Lookup(nn.Module):
    """Parametrization of a tensor by what its codes are looked up in."""


class Shared(Lookup):
    """Parametrization of a tensor by its codebook; the gradient of an entry is the sum over the weights that use it.

    (Deep Compression, eq. 3.) The entry of the zeros is no parameter.
    """

    codes: torch.Tensor

    def __init__(self, coded: Coded) -> None:
        super().__init__()
        self.zeros = coded.zeros
        self.size = coded.codebook.numel()
        self.register_buffer("codes", coded.codes.int())

    def forward(self, codebook: torch.Tensor) -> torch.Tensor:
        """Look the codes up."""
        full = F.pad(codebook, (1, 0)) if self.zeros else codebook
        return full.index_select(0, self.codes.flatten()).view(self.codes.shape)

    def right_inverse(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the codebook of a tensor that these codes describe."""
        full = tensor.new_zeros(self.size).scatter_(0, self.codes.flatten().long(), tensor.flatten())
        return full[1:] if self.zeros else full


class Decodable(Protocol):
    """A tensor as codes and what they are looked up in."""

    def decode(self) -> torch.Tensor:
        """Return the tensor."""

    def lookup(self) -> Lookup:
        """Return the parametrization of the tensor by what its codes are looked up in."""


def share_(model: nn.Module, name: str, coded: Decodable) -> None:
    """Parametrize the parameter `name` by its codebook, in every layer that uses it."""
    parameter = model.get_parameter(name)
    codebook: nn.Parameter | None = None
    for layer, own_name in places(model, parameter):
        setattr(layer, own_name, nn.Parameter(coded.decode(), requires_grad=parameter.requires_grad))
        parametrize.register_parametrization(layer, own_name, coded.lookup())
        lookup = computed(layer, Lookup)[own_name]
        codebook = lookup.original if codebook is None else codebook
        lookup.original = codebook
