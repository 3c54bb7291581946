"""The mean error that rounded weights make in the outputs of a layer, taken off its bias (Nagel et al. 2019, 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from rarefy.calibration import Visit, stream_inputs
from rarefy.hessian import LAYERS, as_rows, vectors
from rarefy.task import Task
from torch import nn


class MeanInput:
    """Accumulates the mean of the vectors that a layer multiplies its rows with."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.seen = layer, 0
        self.total: torch.Tensor | float = 0.0

    def update(self, inputs: torch.Tensor) -> None:
        """Take in one input of the layer."""
        for x in vectors(self.layer, inputs):
            self.seen += x.shape[1]
            self.total = self.total + x.sum(1, dtype=torch.float64)

    @property
    def value(self) -> torch.Tensor:
        """The mean, `(groups, columns)`."""
        return torch.as_tensor(self.total) / self.seen


def mean_inputs(model: nn.Module, names: Iterable[str], task: Task, batches: int) -> dict[str, torch.Tensor]:
    """Return the mean input of each named layer that has a bias, where the calibration data reaches it."""
    layers = {name: model.get_submodule(name) for name in names}
    means = {name: MeanInput(layer) for name, layer in layers.items() if _bias(layer) is not None}
    visits: dict[str, Visit] = {name: mean.update for name, mean in means.items()}
    if means:
        stream_inputs(model, task.calibration(batches=batches), visits, "mean inputs of the layers", batches)
    return {name: mean.value for name, mean in means.items() if mean.seen}


@torch.no_grad()
def correct_biases_(model: nn.Module, before: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor]) -> None:
    """Add E[(W - W_q) x] to the biases; `before` holds the rows W of the layers, the model has W_q."""
    for name, mean in means.items():
        layer = model.get_submodule(name)
        change = before[name].double() - as_rows(layer).double()
        _bias(layer).add_(torch.einsum("grc,gc->gr", change, mean).flatten())


def _bias(layer: nn.Module) -> nn.Parameter | None:
    """Return the bias of a layer that adds a plain one to W x."""
    bias = dict(layer.named_parameters(recurse=False)).get("bias")
    return bias if isinstance(layer, LAYERS) else None
