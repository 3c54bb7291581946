"""Fixed point during training, rounded stochastically."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule, refuse_not_finite
from rarefy.weights import LayerWeight, layer_weights
from rarefy_schemas import LayerReport
from torch import nn

from rarefy_quantization.codes import entropy
from rarefy_quantization.rounding.config import FixedPointConfig


@dataclass(frozen=True)
class Format:
    """<IL, FL>: the multiples of 2^-FL from -2^(IL-1) to 2^(IL-1) - 2^-FL (Gupta et al. 2015, section 3)."""

    integer_bits: int
    fraction_bits: int

    def codes(self, values: torch.Tensor, noise: torch.Tensor | float = 0.5) -> torch.Tensor:
        """Return values as multiples of the step, in double precision, saturated.

        A code is floor(x / step + noise): to the nearest for 0.5, halves up, and for noise that is uniform on [0, 1) up
        with the probability of the remainder, which is right on average.
        """
        largest = 2.0 ** (self.integer_bits - 1 + self.fraction_bits)
        return (values.double() * 2.0**self.fraction_bits + noise).floor().clamp(-largest, largest - 1)

    def round(self, values: torch.Tensor, noise: torch.Tensor | float = 0.5) -> torch.Tensor:
        """Return the values that the codes stand for, in the type of `values`."""
        return (self.codes(values, noise) * 2.0**-self.fraction_bits).to(values.dtype)

    def saturates(self, values: torch.Tensor) -> torch.Tensor:
        """Tell which values lie beyond the ends."""
        limit = 2.0 ** (self.integer_bits - 1)
        return (values < -limit) | (values > limit - 2.0**-self.fraction_bits)


class RoundingRule(TrainingRule):
    """Rounds tensors after every optimizer step.

    The noise follows from the seed, the name and the progress alone: it neither depends on nor disturbs any other
    generator, is the same in all processes, and goes on where a training is taken up again.
    """

    def __init__(self, form: Format, names: list[str], seed: int | None) -> None:
        """Round the parameters `names`, to the nearest where `seed` is None."""
        self.form, self.names, self.seed = form, names, seed

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        """Round the tensors."""
        for name in self.names:
            tensor = model.get_parameter(name)
            tensor.copy_(self.form.round(tensor, self._noise(tensor, name, progress)))

    def _noise(self, tensor: torch.Tensor, name: str, progress: float) -> torch.Tensor | float:
        if self.seed is None:
            return 0.5
        generator = torch.Generator().manual_seed(derive(self.seed, name, repr(progress)))
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)


class FixedPoint(Technique[FixedPointConfig]):
    """Rounds weights and biases to a fixed point format, and again after every optimizer step."""

    @property
    def form(self) -> Format:
        """The format of the options."""
        return Format(self.config.integer_bits, self.config.fraction_bits)

    @torch.no_grad()
    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say what rounding does to each layer."""
        weights, skipped = layer_weights(model, self.config)
        names = [f"{weight.name}.weight" for weight in weights]
        for weight in weights:
            bias = dict(weight.layer.named_parameters(recurse=False)).get("bias")
            if self.config.biases and bias is not None:
                refuse_not_finite(weight.name, bias)
                names.append(f"{weight.name}.bias")
        return Analysis(tuple(map(self._report, weights)), tuple(skipped), names)

    @torch.no_grad()
    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Round to the nearest."""
        self._names: list[str] = analysis.plan
        for name in analysis.plan:
            tensor = model.get_parameter(name)
            tensor.copy_(self.form.round(tensor))
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what rounds after every step."""
        stochastic = self.config.rounding == "stochastic"
        return RoundingRule(self.form, self._names, derive(self.seed, "rounding") if stochastic else None)

    def _report(self, weight: LayerWeight) -> LayerReport:
        exact, form = weight.parameter.detach(), self.form
        error = (form.round(exact).double() - exact.double()).square().sum() / exact.double().square().sum()
        beyond = float(form.saturates(exact).double().mean())
        action = f"<{form.integer_bits}, {form.fraction_bits}>, {form.integer_bits + form.fraction_bits} bits"
        scores = {"relative_mse": float(error), "saturated": beyond, "entropy": entropy(form.codes(exact))}
        return LayerReport(name=weight.name, kind=weight.kind, action=action, scores=scores)
