"""Half-wave Gaussian quantization: binary weights, and ReLUs with few levels."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from rarefy.calibration import stream_inputs
from rarefy.errors import StageError
from rarefy.task import Task
from rarefy.technique import Analysis, TrainingRule, replace_
from rarefy_schemas import LayerReport
from torch import nn

from rarefy_quantization.activations.config import HwgqConfig
from rarefy_quantization.activations.half_wave import HalfWave
from rarefy_quantization.grids import Units
from rarefy_quantization.low_bit.projection import LatentRule, Projection, project_
from rarefy_quantization.low_bit.signs import ScaledSigns
from rarefy_quantization.low_bit.technique import LowBitQuantizer


class PositiveSquares:
    """Accumulates the mean square of the values above zero."""

    def __init__(self) -> None:
        self.seen, self.total = 0, 0.0

    def update(self, inputs: torch.Tensor) -> None:
        """Take in one input."""
        positive = inputs[inputs > 0].double()
        self.seen += positive.numel()
        self.total += float(positive.square().sum())

    @property
    def root(self) -> float | None:
        """The root of the mean square, None when nothing was above zero."""
        return (self.total / self.seen) ** 0.5 if self.seen else None


class Hwgq(LowBitQuantizer[HwgqConfig]):
    """Gives weights the signs of BWN, and replaces each ReLU module by a quantized one.

    Every ReLU module counts but those that calibration data never reaches, whatever the targets say: these are about
    weights. A ReLU that the model's forward calls as a function is not found.
    """

    def projection(self, layer: nn.Module, weight: torch.Tensor) -> Projection:
        """Return the signs of the weights."""
        return ScaledSigns(Units.of(weight.shape, self.config.granularity, weight.numel()))

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return nothing that matters for these weights."""
        return LatentRule()

    def action(self) -> str:
        """Return what is done to a layer, in words."""
        return f"binary, bwn, a scale per {self.config.granularity}"

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Quantize the weights, and measure what passes each ReLU."""
        found = super().analyze(model, task)
        sigmas = self._sigmas(self._binarized(model, found.plan), task)
        if not sigmas:
            raise StageError(
                "no nn.ReLU module is reached by the calibration data, and hwgq quantizes what leaves them; write "
                "nn.ReLU() in place of functional calls, or take quantization/binary"
            )
        told = [
            LayerReport(name=name, kind="ReLU", action=f"{self.config.bits} bits, {self.config.levels}",
                        scores={"sigma": sigma})
            for name, sigma in sigmas.items()
        ]  # fmt: skip
        return Analysis((*found.layers, *told), found.skipped, (found.plan, sigmas))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Replace the ReLUs and have the layers compute with quantized weights."""
        names, sigmas = analysis.plan
        config = self.config
        for name, sigma in sigmas.items():
            old = model.get_submodule(name)
            new = HalfWave(config.bits, config.levels == "uniform", config.backward == "log-tailed", sigma)
            replace_(model, old, new.train(old.training))
        return super().transform(model, Analysis(plan=names), task)

    def _binarized(self, model: nn.Module, names: Iterable[str]) -> nn.Module:
        """Return a copy of the model with quantized weights, which move the scale of what follows."""
        twin = copy.deepcopy(model)
        for name in names:
            layer = twin.get_submodule(name)
            project_(twin, layer.get_parameter("weight"), self.projection(layer, layer.weight.detach()))
        return twin

    def _sigmas(self, model: nn.Module, task: Task) -> dict[str, float]:
        found = {name: PositiveSquares() for name, module in model.named_modules() if type(module) is nn.ReLU}
        visits = {name: squares.update for name, squares in found.items()}
        if visits:
            batches = self.config.batches
            stream_inputs(model, task.calibration(batches=batches), visits, "inputs of the ReLUs", batches)
        roots = {name: squares.root for name, squares in found.items()}
        one = self.config.sigma == "one"
        return {name: 1.0 if one else root for name, root in roots.items() if root is not None}
