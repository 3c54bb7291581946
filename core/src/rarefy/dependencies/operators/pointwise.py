"""Operators that act element by element, and those that make constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rarefy.dependencies.fields import Fields, along
from rarefy.dependencies.tracing import UNKNOWN, Call, Trace


def pointwise(trace: Trace, call: Call) -> None:
    """Unite the channels that meet after broadcasting."""
    fields = combined(trace, call.tensors)
    for out in call.outputs:
        trace.set(out, fields)


def combined(trace: Trace, tensors: Sequence[torch.Tensor]) -> Fields:
    """Return the fields of tensors that meet element by element."""
    fields: Fields = []
    shape: Sequence[int] = ()
    for tensor in tensors:
        own = extent(tensor)
        fields = trace.algebra.meet(fields, shape, trace.fields(tensor), own, UNKNOWN)
        shape = np.broadcast_shapes(tuple(shape), own)
    return fields


def extent(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the values of a tensor, of size 1 where it was expanded."""
    strides = tensor.stride() if tensor.layout == torch.strided else (1,) * tensor.dim()
    return tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True))


def like(trace: Trace, call: Call) -> None:
    """Give a constant of a tensor's shape that tensor's channels."""
    for out in call.outputs:
        trace.set(out, trace.fields(call.tensors[0]))


def constant(trace: Trace, call: Call) -> None:
    """Give a constant channels of its own: code that makes it by size makes it smaller when told a smaller size."""
    out = call.outputs[0]
    labels = trace.algebra.labels
    trace.set(out, [along(labels.fresh(size), d, out.dim()) for d, size in enumerate(out.shape) if size > 1])
