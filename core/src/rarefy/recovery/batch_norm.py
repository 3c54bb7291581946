"""Statistics of batch norms, measured anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy.errors import StageError
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.progress import track
from rarefy.recovery.config import BatchNormConfig
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, select

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Mean and variance of each channel, `(channels,)`, by the name of the batch norm."""


class BatchNormStatistics(Technique[BatchNormConfig]):
    """Gives each batch norm the statistics that calibration data has now, or what has changed in them.

    Measured are the mean over batches of their means and of their unbiased variances. With `relative`, in m + m1 - m0
    and v v1 / v0, the original network's m and v are those it was trained with, 0 and 1 tell what is measured on the
    original network and on this one; so what the calibration data has of its own drops out.
    """

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which batch norms have statistics."""
        layers, skipped, plan = [], [], []
        for name, layer in select(model, self.config, derived=True):
            kind = type(layer).__name__
            if getattr(layer, "running_mean", None) is None:
                reason = "it keeps no statistics, and takes those of each batch"
                skipped.append(SkippedLayer(name=name, kind=kind, reason=reason))
                continue
            what = "statistics" if self._counterpart(name, layer) is None else "change of the statistics"
            layers.append(LayerReport(name=name, kind=kind, action=f"{what} over {self.config.batches} batches"))
            plan.append(name)
        return Analysis(tuple(layers), tuple(skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Measure; raise `StageError`, with the old statistics in place, when that gives none."""
        norms: dict[str, Any] = {name: model.get_submodule(name) for name in analysis.plan}
        before = {name: self._counterpart(name, norm) for name, norm in norms.items()}
        matched = {name: norm for name, norm in before.items() if norm is not None}
        now = self._statistics(model, norms, task)
        then = self._statistics(self.original, matched, task) if self.original is not None else {}
        for name, norm in norms.items():
            mean, variance = now[name]
            if name in then:
                old, eps = matched[name], norm.eps
                mean = old.running_mean + (mean - then[name][0])
                variance = old.running_var * ((variance + eps) / (then[name][1] + eps))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        return model

    def _counterpart(self, name: str, norm: Any) -> Any:
        """Return the batch norm of as many channels that the original model has in the place of this one, or None."""
        if not self.config.relative or self.original is None:
            return None
        found = dict(self.original.named_modules()).get(name)
        mean = getattr(found, "running_mean", None)
        return found if mean is not None and mean.shape == norm.running_mean.shape else None

    def _statistics(self, model: nn.Module, norms: dict[str, Any], task: Task) -> Statistics:
        return measured(model, norms, task, self.config.batches, self.config.batch_size) if norms else {}


def measured(
    model: nn.Module, norms: dict[str, Any], task: Task, batches: int, batch_size: int | None = None
) -> Statistics:
    """Return the means and variances of what some batch norms of a model get from the task's calibration data.

    Each batch norm uses those of the batch; everything else runs in evaluation mode. The model stays as it is. Raises
    `StageError` when no data reaches one, or when a statistic is not finite.
    """
    with evaluation(model), _measuring(norms.values()), torch.no_grad():
        for batch in track(task.calibration(batch_size, batches), "measuring batch norms", batches):
            model(*move(batch, device_of(model)))
        _check(norms)
        return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}


def _check(norms: dict[str, Any]) -> None:
    for name, norm in norms.items():
        if not int(norm.num_batches_tracked):
            raise StageError(
                f"no calibration data reached the batch norm {name!r}: give the task training data, or leave the layer "
                "out by `targets: {exclude: [...]}`"
            )
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise StageError(
                f"what reaches the batch norm {name!r} is NaN or infinite; check the steps before this one"
            )


@contextlib.contextmanager
def _measuring(norms: Any) -> Iterator[None]:
    """Have batch norms average the statistics of batches, and count these from 0; afterwards they are as before."""
    norms = list(norms)
    state = ("running_mean", "running_var", "num_batches_tracked")
    kept = [(norm.training, norm.momentum, [getattr(norm, name).clone() for name in state]) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    try:
        yield
    finally:
        for norm, (training, momentum, old) in zip(norms, kept, strict=True):
            norm.train(training)
            norm.momentum = momentum
            for name, tensor in zip(state, old, strict=True):
                getattr(norm, name).copy_(tensor)
