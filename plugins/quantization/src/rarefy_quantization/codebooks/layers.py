"""Layers whose weight is a sum of vectors from several codebooks."""

from __future__ import annotations

import math
from functools import reduce

import torch
from rarefy.errors import StageError
from rarefy.modules import register_module
from rarefy.modules.derived import DerivedConvolution, DerivedLinear, DerivedWeight
from torch import nn

_MOST_CODES = 65536


def code_type(codes: int) -> torch.dtype:
    """Return the smallest type of integer, of those that a file can hold, for codes below `codes`."""
    return torch.uint8 if codes <= 2**8 else torch.int16 if codes <= 2**15 else torch.int32


def summed(codes: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Return the sums of the vectors that the codes choose, (vectors, length).

    `codes` is (stages, vectors), `codebooks` (stages, codes, length).
    """
    chosen = (book.index_select(0, places.int()) for places, book in zip(codes, codebooks, strict=True))
    return reduce(torch.add, chosen)


class ResidualLayer(DerivedWeight):
    """What the layers share: w is the sum over the stages t of c_t[code_t], vector by vector.

    `codebooks`, (stages, codes per stage, length), the bias and the buffer `codes`, (stages, vectors), are all that is
    stored; all are zero until they are given. The gradient of a vector is the sum over the places that use it.
    """

    shape: tuple[int, ...]
    """Shape of the weight."""
    codes: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        stages: int,
        count: int,
        length: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        row = math.prod(shape[1:])
        if stages < 1 or not 1 <= count <= _MOST_CODES:
            raise StageError(f"a layer has stages of 1 to {_MOST_CODES} vectors, not {stages} stages of {count}")
        if length < 1 or row % length:
            raise StageError(f"outputs of {row} weights each cannot be cut into vectors of {length}")
        self.shape, self.stages, self.count, self.length = shape, stages, count, length
        self.codebooks = nn.Parameter(torch.zeros(stages, count, length, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if bias else None
        vectors = shape[0] * row // length
        self.register_buffer("codes", torch.zeros(stages, vectors, device=device, dtype=code_type(count)))

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight that codes and codebooks stand for."""
        return summed(self.codes, self.codebooks).view(self.shape)

    def extra_repr(self) -> str:
        """Return what the printed model says of the layer."""
        return f"{'x'.join(map(str, self.shape))} weights, {self.stages} x {self.count} vectors of {self.length}"


@register_module
class ResidualLinear(DerivedLinear, ResidualLayer):
    """A linear layer of `stages` codebooks with `count` vectors of `length` weights."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stages: int,
        count: int,
        length: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), stages, count, length, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features


@register_module
class ResidualConv(DerivedConvolution, ResidualLayer):
    """A convolution of `stages` codebooks; the other arguments as of `torch.nn.Conv1d`, `Conv2d` or `Conv3d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stages: int,
        count: int,
        length: int,
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, stages, count, length, bias, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.padding_mode = groups, padding_mode
