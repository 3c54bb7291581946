"""Neural networks with few multiplications: drawn weights, and gradients of weights by shifts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from rarefy.task import Task
from rarefy.technique import Analysis, TrainingRule
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rarefy_quantization.activations.config import FewMultiplicationsConfig
from rarefy_quantization.low_bit.projection import Clipped, LatentRule, Projection, wide
from rarefy_quantization.low_bit.signs import ConnectedSigns, glorot
from rarefy_quantization.low_bit.technique import LowBitQuantizer
from rarefy_quantization.parametrizations import with_gradient


class ConnectedTernary(Clipped):
    """-h, 0 or h of real weights between -h and h (Lin et al. 2016, section 3.2).

    Training draws the sign of w times h with the probability |w| / h and 0 otherwise, which is w on average; evaluation
    takes the nearest.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantized weight."""
        values = wide(weight.detach())
        # from the generator that dropout draws from, which the training seeds
        threshold = torch.rand_like(values) if self.training else 0.5
        kept = values.abs() > self.limit * threshold
        return with_gradient((values.sign() * kept * self.limit).to(weight.dtype), weight)


def power_of_two(values: torch.Tensor, shifts: int) -> torch.Tensor:
    """Return signs times the powers of two that are nearest in the logarithm, up to 2^shifts; 0 below 2^-shifts."""
    exponents = values.abs().log2().round().clamp(max=shifts)
    return torch.where(exponents < -shifts, 0, values.sign() * exponents.exp2())


class ShiftedInput:
    """Has a layer keep its input for the backward pass rounded to powers of two.

    There it is multiplied with the gradient of the output to give that of the weight, and only there: the output and
    the gradient of the input are as they were (Lin et al. 2016, section 4).
    """

    def __init__(self, layer: nn.Module, shifts: int) -> None:
        self.shifts, self.stack = shifts, ExitStack()
        self.handles = [
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        where = args[0].untyped_storage().data_ptr()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            is_input = tensor.untyped_storage().data_ptr() == where
            return power_of_two(tensor.detach(), self.shifts) if is_input else tensor

        self.stack.enter_context(saved_tensors_hooks(keep, lambda kept: kept))

    def _after(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.stack.close()

    def remove(self) -> None:
        """Let the layer be as it was."""
        for handle in self.handles:
            handle.remove()


class FewMultiplications(LowBitQuantizer[FewMultiplicationsConfig]):
    """Draws weights in the forward pass, so that products become changes of sign, and rounds inputs in the backward."""

    def __init__(self, config: FewMultiplicationsConfig) -> None:
        super().__init__(config)
        self.shifted: list[ShiftedInput] = []

    def projection(self, layer: nn.Module, weight: torch.Tensor) -> Projection:
        """Return what draws the weights."""
        limit = glorot(layer, weight.shape)
        return ConnectedSigns(limit, stochastic=True) if self.config.values == "binary" else ConnectedTernary(limit)

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what clips the weights."""
        return LatentRule()

    def action(self) -> str:
        """Return what is done to a layer, in words."""
        return f"{self.config.values}, drawn in training; inputs as powers of two in its gradient"

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Have the layers compute with drawn weights, and keep rounded inputs."""
        model = super().transform(model, analysis, task)
        self.shifted = [ShiftedInput(model.get_submodule(name), self.config.shifts) for name in analysis.plan]
        return model

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave plain weights of few values."""
        for shifted in self.shifted:
            shifted.remove()
        return super().consolidate(model)
