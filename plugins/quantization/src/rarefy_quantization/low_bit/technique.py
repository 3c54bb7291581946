"""What the techniques for weights of one or two bits have in common: layers, the ends, training and what remains."""

from __future__ import annotations

from typing import TypeVar

import torch
from rarefy.calibration import stream_inputs
from rarefy.task import Task
from rarefy.technique import Analysis, Technique
from rarefy.weights import LayerWeight, holders, layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.codes import entropy
from rarefy_quantization.low_bit.config import LowBitQuantization
from rarefy_quantization.low_bit.projection import Projection, project_, wide
from rarefy_quantization.parametrizations import make_plain_

ConfigT = TypeVar("ConfigT", bound=LowBitQuantization)


class LowBitQuantizer(Technique[ConfigT]):
    """Gives weights two or three values per layer or channel; write `projection` and `action`."""

    def projection(self, layer: nn.Module, weight: torch.Tensor) -> Projection:
        """Return what quantizes the weight of `layer`, and trains it."""
        raise NotImplementedError

    def action(self) -> str:
        """Return what is done to a layer, in words."""
        raise NotImplementedError

    @torch.no_grad()
    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Quantize every target layer but the ends, and say with what error."""
        weights, skipped = layer_weights(model, self.config)
        kept = ends(model, self.config.traits.layers, task) if self.config.keep_ends else {}
        layers = []
        for weight in weights:
            end = next((name for name in holders(model, weight.parameter) if name in kept), None)
            if end is None:
                layers.append(self._report(weight))
            else:
                which = "it is" if end == weight.name else f"it shares its weight with {end!r},"
                reason = f"{which} the {kept[end]} layer that an input reaches, which `keep_ends: true` leaves as it is"
                skipped.append(SkippedLayer(name=weight.name, kind=weight.kind, reason=reason))
        return Analysis(tuple(layers), tuple(skipped), [layer.name for layer in layers])

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Have the layers compute with quantized weights."""
        for name in analysis.plan:
            layer = model.get_submodule(name)
            parameter = layer.get_parameter("weight")
            project_(model, parameter, self.projection(layer, parameter.detach()))
        if self.config.finetune is None:
            self.notes.append(
                "The weights were quantized without training, for which this method is not meant; give `finetune`."
            )
        return model

    def consolidate(self, model: nn.Module) -> nn.Module:
        """Leave plain weights of few values."""
        make_plain_(model.eval(), Projection)  # signs are drawn in training mode only
        return model

    def _report(self, weight: LayerWeight) -> LayerReport:
        exact = weight.parameter.detach()
        projection = self.projection(weight.layer, exact).eval()
        quantized = projection(projection.start(exact))
        error = (quantized.double() - exact.double()).square().sum() / exact.double().square().sum()
        scores = {"entropy": entropy(wide(quantized).sign()), "relative_mse": float(error)}
        return LayerReport(name=weight.name, kind=weight.kind, action=self.action(), scores=scores)


def ends(model: nn.Module, kinds: tuple[str, ...], task: Task) -> dict[str, str]:
    """Return the names of the first and the last layer of `kinds` that an example input reaches, each with its place.

    Of several outputs computed side by side, only the layer that runs last counts.
    """
    calls: list[str] = []
    names = [name for name, module in model.named_modules() if name and type(module).__name__ in kinds]
    visits = {name: lambda _, name=name: calls.append(name) for name in names}
    stream_inputs(model, [task.example_inputs()], visits, "finding the first and the last layer", 1)
    return {calls[-1]: "last", calls[0]: "first"} if calls else {}
