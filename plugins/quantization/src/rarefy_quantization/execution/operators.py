"""torch's integer operators on a CPU, and the one place that calls them.

`torch.ao.quantization`, which was built around them, is being deleted, and they may follow. So nothing but the
operators is used, only after they were tried, and whoever packs a layer gets float arithmetic where they are of no use.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

Kind = Literal["linear", "conv2d"]
Run = Callable[[torch.Tensor], torch.Tensor]
"""A layer: float32 to float32."""


@dataclass(frozen=True)
class Affine:
    """The values step * (code - zero) for the codes from 0 to 2**bits - 1."""

    step: float
    zero: int
    bits: int = 8

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest values of the grid, as a tensor of torch's type `quint8`."""
        if self.bits < 8:  # the type itself ends at 255 only
            ends = -self.zero * self.step, (2**self.bits - 1 - self.zero) * self.step
            values = values.clamp(*ends)
        with_type: torch.Tensor = torch.quantize_per_tensor(values, self.step, self.zero, torch.quint8)
        return with_type


@dataclass(frozen=True)
class Geometry:
    """How a kernel is moved over an image; pairs are (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Trial:
    """What the operators of the current engine did with the largest products."""

    bits: int = 8
    """Bits of an activation with which sums are exact."""
    obstacle: str | None = None
    """Why they cannot be used."""


def trial(kind: Kind) -> Trial:
    """Try the operators of `kind` with the engine `torch.backends.quantized.engine`, once per process.

    x86 kernels without VNNI instructions add two products of unsigned and signed bytes in 16 bits, which 2 * 255 * 127
    exceeds and 2 * 127 * 128 does not: their sums saturate unless activations have 7 bits.
    """
    return _trial(kind, str(torch.backends.quantized.engine))


@functools.cache
def _trial(kind: Kind, engine: str) -> Trial:
    named = f"torch {torch.__version__} with the engine {engine!r}"
    exact = _linear_is_exact if kind == "linear" else _conv2d_is_exact
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once per process that quantized tensors are deprecated
            for bits in (8, 7):
                if exact(bits):
                    return Trial(bits)
    except (AttributeError, RuntimeError, TypeError) as error:
        first = str(error).partition("\n")[0][:200]
        return Trial(obstacle=f"{named} does not run quantized::{kind}: {first}")
    return Trial(obstacle=f"quantized::{kind} of {named} gives wrong sums")


def pack_linear(codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, bits: int) -> Run:
    """Return a layer that multiplies with int8 `codes`, `(out, inputs)`, times `scales`, `(out,)`.

    Its activations, `(..., inputs)`, are rounded to `bits` (8 or 7) between the least and the greatest of each call, so
    that the samples of a batch influence one another.
    """
    packed = torch.ops.quantized.linear_prepack(_weight(codes, scales), bias)

    def run(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.quantized.linear_dynamic(x.unsqueeze(0), packed, bits < 8)
        return out.squeeze(0)

    return run


def pack_conv2d(
    codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, given: Affine, out: Affine
) -> Run:
    """Return a convolution with int8 `codes`, `(out, inputs per group, height, width)`, times `scales`, `(out,)`.

    Images are rounded to the grid `given`, what becomes of them to the grid `out`. Their layout in memory, channels
    first or last, is that of what they were given.
    """
    shape = [list(pair) for pair in (geometry.stride, geometry.padding, geometry.dilation)]
    packed = torch.ops.quantized.conv2d_prepack(_weight(codes, scales), bias, *shape, geometry.groups)

    def run(x: torch.Tensor) -> torch.Tensor:
        images = x if x.dim() == 4 else x.unsqueeze(0)
        found: torch.Tensor = torch.ops.quantized.conv2d(given.quantize(images), packed, out.step, out.zero)
        if images.is_contiguous():  # the kernel gives channels last, with which a later `view` may fail
            found = found.contiguous()
        found = found.dequantize()
        return found if x.dim() == 4 else found.squeeze(0)

    return run


def float_linear(codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Run:
    """Return what `pack_linear` stands for, without rounding of activations, on float32."""
    return functools.partial(F.linear, weight=dequantized(codes, scales), bias=bias)


def float_conv2d(codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> Run:
    """Return what `pack_conv2d` stands for, without rounding of activations, on float32."""
    g = geometry
    return functools.partial(
        F.conv2d, weight=dequantized(codes, scales), bias=bias,
        stride=g.stride, padding=g.padding, dilation=g.dilation, groups=g.groups,
    )  # fmt: skip


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return codes times the scale of their output."""
    return codes * scales.reshape(-1, *[1] * (codes.dim() - 1))


def _weight(codes: torch.Tensor, scales: torch.Tensor) -> Any:
    """Return a weight of torch's type `qint8`, made of the very codes."""
    zeros = torch.zeros(len(scales), dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)


def _linear_is_exact(bits: int) -> bool:
    codes = torch.tensor([[127], [-128]], dtype=torch.int8).repeat(8, 64)
    run = pack_linear(codes, torch.ones(16), None, bits)
    wanted = 64.0 * 255 * codes[:, 0]
    # kernels for one row and for several may differ
    return all(torch.allclose(run(torch.full((rows, 64), 255.0)), wanted, rtol=1e-3) for rows in (1, 16))


def _conv2d_is_exact(bits: int) -> bool:
    most = 2**bits - 1
    return all(_one_conv2d_is_exact(bits, most, groups) for groups in (1, 16))


def _one_conv2d_is_exact(bits: int, most: int, groups: int) -> bool:
    values = torch.tensor([127, -128], dtype=torch.int8).repeat(8)
    codes = values.reshape(16, 1, 1, 1).repeat(1, 16 // groups, 3, 3)
    step = 9.0 * 16 / groups * most  # of the outputs, which are `values` times it
    run = pack_conv2d(codes, torch.ones(16), None, Geometry(groups=groups), Affine(1.0, 0, bits), Affine(step, 128))
    found = run(torch.full((1, 16, 5, 5), float(most))) / step
    return bool(((found - values.reshape(16, 1, 1)).abs() <= 1).all())
