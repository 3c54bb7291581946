"""Layers on 8-bit integers, for inference on a CPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from rarefy_quantization.execution.operators import (
    Affine,
    Geometry,
    Kind,
    Run,
    dequantized,
    float_conv2d,
    float_linear,
    pack_conv2d,
    pack_linear,
    trial,
)


class IntegerLayer(nn.Module):
    """Holds the integers of a weight as plain tensors, and what the kernels made of them, which is never stored.

    So a copy, a pickle and a state dict hold tensors only, and whoever reads one packs anew, for the machine it runs
    on. Where the operators are missing, that machine computes in float32, and a warning says so.
    """

    kind: Kind
    bits: int
    """Of the activations."""
    codes: torch.Tensor
    """int8, shaped like the weight."""
    scales: torch.Tensor
    """float32, `(out,)`."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight in float32, made anew at each call."""
        return dequantized(self.codes, self.scales)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return what the layer gives; no gradient passes."""
        return self._run(input)

    def extra_repr(self) -> str:
        """Return the shape of the weight and the bits of the activations."""
        return f"weight={tuple(self.codes.shape)}, bits={self.bits}"

    def integers(self) -> Run:
        """Return the layer on the kernels."""
        raise NotImplementedError

    def floats(self) -> Run:
        """Return the layer without them."""
        raise NotImplementedError

    def pack_(self) -> None:
        """Hand the tensors to the kernels."""
        found = trial(self.kind)
        obstacle = found.obstacle
        if obstacle is None and found.bits < self.bits:
            obstacle = f"the sums of quantized::{self.kind} saturate with activations of {self.bits} bits"
        if obstacle is not None:
            warnings.warn(f"{obstacle}; {type(self).__name__} computes in float32, which is slower", stacklevel=2)
        self._run = self.floats() if obstacle is not None else self.integers()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the kernels made of the tensors."""
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack anew."""
        super().__setstate__(state)
        self.pack_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.pack_()


class IntegerLinear(IntegerLayer):
    """A linear layer whose activations are rounded at each call, by the operator `quantized::linear_dynamic`."""

    kind = "linear"

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(codes, scales, bias)
        self.bits = trial(self.kind).bits
        self.out_features, self.in_features = codes.shape
        self.pack_()

    def integers(self) -> Run:
        """Return the layer on `quantized::linear_dynamic`."""
        return pack_linear(self.codes, self.scales, self.bias, self.bits)

    def floats(self) -> Run:
        """Return the layer on `F.linear`."""
        return float_linear(self.codes, self.scales, self.bias)


class IntegerConv2d(IntegerLayer):
    """A convolution between two fixed grids, by the operator `quantized::conv2d`."""

    kind = "conv2d"

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        geometry: Geometry,
        given: Affine,
        out: Affine,
    ) -> None:
        super().__init__(codes, scales, bias)
        self.geometry, self.bits = geometry, given.bits
        # (step, zero) of what it is given and of what it gives
        self.register_buffer("grids", torch.tensor([[given.step, given.zero], [out.step, out.zero]]))
        self.out_channels, self.in_channels = len(codes), codes.shape[1] * geometry.groups
        self.pack_()

    def integers(self) -> Run:
        """Return the layer on `quantized::conv2d`."""
        (step, zero), (out_step, out_zero) = self.grids.tolist()
        given, out = Affine(step, int(zero), self.bits), Affine(out_step, int(out_zero))
        return pack_conv2d(self.codes, self.scales, self.bias, self.geometry, given, out)

    def floats(self) -> Run:
        """Return the layer on `F.conv2d`."""
        return float_conv2d(self.codes, self.scales, self.bias, self.geometry)
