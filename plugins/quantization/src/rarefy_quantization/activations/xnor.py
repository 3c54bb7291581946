"""XNOR-Net and BinaryNet: signs of weights and of inputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from rarefy.calibration import stream_inputs
from rarefy.task import Task
from rarefy.technique import Analysis, TrainingRule, replace_
from rarefy.weights import holders
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.activations.config import XnorConfig
from rarefy_quantization.activations.layers import SignConv2d, SignLinear
from rarefy_quantization.grids import Units
from rarefy_quantization.low_bit.projection import LatentRule, Projection
from rarefy_quantization.low_bit.signs import ConnectedSigns, ScaledSigns, glorot
from rarefy_quantization.low_bit.technique import LowBitQuantizer


class Moments:
    """Accumulates mean and variance of each channel of a layer's inputs, and their least value."""

    def __init__(self, dim: int) -> None:
        self.dim, self.seen, self.least = dim, 0, torch.inf
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def update(self, inputs: torch.Tensor) -> None:
        """Take in one input; its channels lie along the dimension `dim`."""
        channels = inputs.double().movedim(self.dim, 0).flatten(1)
        self.seen += channels.shape[1]
        self.total = self.total + channels.sum(1)
        self.squares = self.squares + channels.square().sum(1)
        self.least = min(self.least, float(channels.min()))

    @property
    def mean(self) -> torch.Tensor:
        """The mean, `(channels,)`."""
        return self.total / self.seen

    @property
    def variance(self) -> torch.Tensor:
        """The variance, `(channels,)`."""
        return (self.squares / self.seen - self.mean.square()).clamp(min=0)


class Xnor(LowBitQuantizer[XnorConfig]):
    """Replaces layers by those that take signs, behind a batch norm where signs would all be alike.

    The block order is that of XNOR-Net, section 3.3: batch norm, signs, convolution. What came between two layers
    before, such as a ReLU or a pooling, stays where it was.
    """

    def projection(self, layer: nn.Module, weight: torch.Tensor) -> Projection:
        """Return the signs of the weights."""
        if self.config.method == "binary-net":
            return ConnectedSigns(glorot(layer, weight.shape), stochastic=False)
        return ScaledSigns(Units.of(weight.shape, self.config.granularity, weight.numel()))

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what clips the weights."""
        return LatentRule()

    def action(self) -> str:
        """Return what is done to a layer, in words."""
        return f"signs of weights and inputs, {self.config.method}"

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Quantize the weights, and find out where a batch norm is needed."""
        found = super().analyze(model, task)
        obstacles = {layer.name: _obstacle(model, layer.name) for layer in found.layers}
        names = [name for name, reason in obstacles.items() if reason is None]
        moments = self._moments(model, names, task)
        unreached = {name: "the calibration data never reaches it" for name in names if not moments[name].seen}
        obstacles = {name: reason for name, reason in (obstacles | unreached).items() if reason is not None}
        skipped = [SkippedLayer(name=x.name, kind=x.kind, reason=obstacles[x.name]) for x in found.layers
                   if x.name in obstacles]  # fmt: skip
        plan = {name: self._statistics(moments[name]) for name in names if name not in obstacles}
        layers = [_told(layer, plan[layer.name] is not None) for layer in found.layers if layer.name in plan]
        return Analysis(tuple(layers), (*found.skipped, *skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Replace the layers and have them compute with quantized weights."""
        names = []
        for name, statistics in analysis.plan.items():
            old = model.get_submodule(name)
            new = _with_signs(old, self.config.method == "xnor-net")
            if statistics is not None:
                norm = _norm(old, *statistics)
                new = nn.Sequential(norm, new)
                name = f"{name}.1"
            replace_(model, old, new.train(old.training))
            names.append(name)
        return super().transform(model, Analysis(plan=names), task)

    def _moments(self, model: nn.Module, names: Iterable[str], task: Task) -> dict[str, Moments]:
        found = {name: Moments(-1 if isinstance(model.get_submodule(name), nn.Linear) else -3) for name in names}
        visits = {name: moments.update for name, moments in found.items()}
        if visits:
            batches = self.config.batches
            stream_inputs(model, task.calibration(batches=batches), visits, "inputs of the layers", batches)
        return found

    def _statistics(self, moments: Moments) -> tuple[torch.Tensor, torch.Tensor] | None:
        needed = self.config.norm == "always" or (self.config.norm == "where-needed" and moments.least >= 0)
        return (moments.mean, moments.variance) if needed else None


def _obstacle(model: nn.Module, name: str) -> str | None:
    layer = model.get_submodule(name)
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"it pads with {layer.padding_mode!r} values, and signs are padded with zeros"
    others = [other for other in holders(model, layer.get_parameter("weight")) if other != name]
    return f"it shares its weight with {others[0]!r}" if others else None


def _told(layer: LayerReport, norm: bool) -> LayerReport:
    return layer.model_copy(update={"action": f"{layer.action}{', behind a batch norm' if norm else ''}"})


def _with_signs(layer: Any, input_scale: bool) -> nn.Module:
    """Return the layer of signs that takes over weight and bias."""
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            make = partial(SignLinear, layer.in_features, layer.out_features)
        else:
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            make = partial(SignConv2d, *sizes, layer.stride, layer.padding, layer.dilation, layer.groups)
        new = make(bias=layer.bias is not None, input_scale=input_scale)
    new.weight, new.bias = layer.weight, layer.bias
    return new


def _norm(layer: Any, mean: torch.Tensor, variance: torch.Tensor) -> nn.Module:
    """Return a batch norm of the inputs of `layer`."""
    kind, count = (nn.BatchNorm1d, layer.in_features) if isinstance(layer, nn.Linear) else (
        nn.BatchNorm2d, layer.in_channels)  # fmt: skip
    norm = kind(count).to(layer.weight)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    return norm
