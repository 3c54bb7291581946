"""Trellis-coded quantization of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rarefy.task import Task
from rarefy.technique import Analysis
from rarefy.trellis import Integers, multiples, rows
from rarefy.weights import LayerWeight, layer_weights, per_layer
from rarefy_schemas import LayerReport, SkippedLayer

from rarefy_quantization.codes import Lookup
from rarefy_quantization.grids import round_step
from rarefy_quantization.parametrizations import with_gradient
from rarefy_quantization.sharing import CodebookTechnique
from rarefy_quantization.trellis.config import TrellisConfig
from rarefy_quantization.trellis.viterbi import Floats, Prices, best_path

_PRICE = 0.3
"""Squared steps that a bit is worth. At many bits the error D of 8 states is .26 squared steps and falls by 2 ln 2 D
per bit, which makes .36; what was measured (docs/benchmarks.md) is .3, and no other value was tried."""
_PASSES = 2
_STEPS = 8
_SAMPLE = 128
_FEWEST = 32


@dataclass(frozen=True)
class Path:
    """A tensor as multiples of one step."""

    multiple: torch.Tensor
    """int32, in the tensor's shape."""
    step: torch.Tensor
    """A number of 16 significant bits, so that multiples are exact."""
    dtype: torch.dtype
    rate: float
    """Bits per weight that is not pruned."""

    def decode(self) -> torch.Tensor:
        """Return the tensor."""
        return (self.multiple * self.step).to(self.dtype)

    def lookup(self) -> Lookup:
        """Return the parametrization of the tensor by its step."""
        return Multiples(self)


class Multiples(Lookup):
    """Parametrization of a tensor by the step that its entries are multiples of."""

    multiple: torch.Tensor
    start: torch.Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.register_buffer("multiple", path.multiple)
        self.register_buffer("start", path.step)

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        """Return the tensor; `factor` multiplies the step it began with, and is 1 at first."""
        exact = self.multiple * round_step(self.start * factor.detach().clamp(min=0.01))
        return with_gradient(exact, self.multiple * self.start * factor).to(factor.dtype)

    def right_inverse(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the factor of the tensor that these multiples describe."""
        return torch.ones((), dtype=tensor.dtype, device=tensor.device)


class TrellisQuantization(CodebookTechnique[TrellisConfig]):
    """Gives each layer the step at which the cheapest path through the trellis has the wanted rate."""

    @torch.no_grad()
    def analyze(self, model: torch.nn.Module, task: Task) -> Analysis:
        """Quantize every target layer and say with what error."""
        weights, skipped = layer_weights(model, self.config)
        names = [w.name for w in weights] + [s.name for s in skipped]
        rates = per_layer(names, self.config.per_layer, self.config.rate)
        layers, plan = [], {}
        for weight in weights:
            alive = int(weight.parameter.count_nonzero())
            if alive < _FEWEST:
                reason = f"it has {alive} weights that are not zero, and a path of fewer than {_FEWEST} saves nothing"
                skipped.append(SkippedLayer(name=weight.name, kind=weight.kind, reason=reason))
                continue
            path = quantized(weight.parameter.detach(), rates[weight.name])
            plan[f"{weight.name}.weight"] = path
            layers.append(_report(weight, path))
        return Analysis(tuple(layers), tuple(skipped), plan)


def quantized(weight: torch.Tensor, rate: float) -> Path:
    """Return the path of a tensor of two or more dimensions whose codes have `rate` bits per weight that is not 0."""
    matrix = weight.double().cpu().numpy().reshape(rows(tuple(weight.shape)), -1)
    alive = matrix != 0
    some = slice(None, None, max(1, matrix.shape[1] // _SAMPLE))
    spread = float(np.sqrt(np.square(matrix[alive]).mean()))
    # a Gaussian's entropy at a fine step is log2(spread / step) + 2.05, and one of two grids has every second multiple
    middle = math.log2(spread) + 2.05 - 1 - rate
    low, high = middle - 3, middle + 3
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _coded(matrix[:, some] / 2**middle, alive[:, some])[2]
        low, high = (middle, high) if found > rate else (low, middle)
    step = round_step(torch.tensor(2**high))
    indices, quantizers, entropy = _coded(matrix / float(step), alive)
    multiple = torch.from_numpy(multiples(indices, quantizers)).to(weight.device, torch.int32).reshape(weight.shape)
    return Path(multiple, step.to(weight.device), weight.dtype, entropy)


def _coded(units: Floats, alive: NDArray[np.bool_]) -> tuple[Integers, Integers, float]:
    """Return indices and quantizers of the cheapest paths, prices fitted to them, and their bits per living weight."""
    indices, quantizers = best_path(units, alive)
    for _ in range(_PASSES):
        prices = Prices.measured(indices, quantizers, alive, _PRICE)
        indices, quantizers = best_path(units, alive, prices)
    bits = Prices.measured(indices, quantizers, alive, 1.0)
    total = sum(bits.of(q, indices[alive & (quantizers == q)]).sum() for q in (0, 1))
    return indices, quantizers, float(total) / max(1, int(alive.sum()))


def _report(weight: LayerWeight, path: Path) -> LayerReport:
    exact = weight.parameter.detach().double()
    error = (path.decode().double() - exact).square().sum() / exact.square().sum()
    return LayerReport(
        name=weight.name,
        kind=weight.kind,
        action=f"a path through a trellis of 8 states, {path.rate:.2f} bits per weight that is not zero",
        scores={"rate": path.rate, "step": float(path.step), "relative_mse": float(error)},
    )
