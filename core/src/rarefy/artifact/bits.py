"""Tensors as unsigned integers of the same bits, so that -0.0 and every NaN come back as they were."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rarefy.errors import ArtifactError

Bits = NDArray[np.unsignedinteger[Any]]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def name_of(tensor: torch.Tensor, name: str) -> str:
    """Return the name of a tensor's dtype; raise `ArtifactError` when a file cannot hold the tensor."""
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        raise ArtifactError(
            f"tensor {name!r} is {tensor.dtype}, {tensor.layout}; a file can hold dense tensors of {', '.join(DTYPES)}"
        )
    if tensor.is_meta:
        raise ArtifactError(f"tensor {name!r} has no values (it is on the meta device); load its weights first")
    return _NAMES[tensor.dtype]


def stored(itemsize: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the little-endian unsigned integer of a width in bytes."""
    return np.dtype(f"<u{itemsize}")


def to_bits(tensor: torch.Tensor) -> Bits:
    """Return the elements of a dense tensor as little-endian unsigned integers, without a copy where possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    integers = flat.view(_INTEGERS[flat.itemsize]).numpy()
    bits: Bits = integers.view(f"u{flat.itemsize}").astype(stored(flat.itemsize), copy=False)
    return bits


def from_bits(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of some bits, sharing their memory where possible."""
    if dtype == torch.bool and bits.size and int(bits.max()) > 1:
        raise ArtifactError("a truth value is neither 0 nor 1")
    native = bits.astype(f"u{bits.itemsize}", copy=False)
    signed = native if bits.itemsize == 1 else native.view(f"i{bits.itemsize}")
    return torch.from_numpy(signed).view(dtype).reshape(shape)


def row_width(shape: tuple[int, ...]) -> int:
    """Return the elements of each index of the first dimension, or 1 where there is no other or none of them."""
    return max(1, math.prod(shape[1:]))


def elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)
