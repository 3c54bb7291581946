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


class BatchNormStatistics(Technique[BatchNormConfig]):
    """Gives each batch norm the mean over batches of their means and unbiased variances."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say which batch norms have statistics."""
        layers, skipped, plan = [], [], []
        for name, layer in select(model, self.config, derived=True):
            kind = type(layer).__name__
            if getattr(layer, "running_mean", None) is None:
                reason = "it keeps no statistics, and takes those of each batch"
                skipped.append(SkippedLayer(name=name, kind=kind, reason=reason))
                continue
            layers.append(LayerReport(name=name, kind=kind, action=f"statistics of {self.config.batches} batches"))
            plan.append(name)
        return Analysis(tuple(layers), tuple(skipped), plan)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Measure."""
        norms: dict[str, Any] = {name: model.get_submodule(name) for name in analysis.plan}
        if norms:
            reestimate_(model, norms, task, self.config.batches, self.config.batch_size)
        return model


def reestimate_(
    model: nn.Module, norms: dict[str, Any], task: Task, batches: int, batch_size: int | None = None
) -> None:
    """Measure the statistics of some batch norms of a model on the task's calibration data.

    Everything else runs in evaluation mode. Raises `StageError`, with the old statistics in place, when there is no
    data, or when a statistic is not finite.
    """
    before = {name: [norm.running_mean.clone(), norm.running_var.clone()] for name, norm in norms.items()}
    try:
        with evaluation(model), _measuring(norms.values()), torch.no_grad():
            for batch in track(task.calibration(batch_size, batches), "measuring batch norms", batches):
                model(*move(batch, device_of(model)))
            _check(norms)
    except BaseException:
        for name, old in before.items():
            norms[name].running_mean.copy_(old[0])
            norms[name].running_var.copy_(old[1])
        raise


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
    kept = [(norm.training, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean over all batches
    try:
        yield
    finally:
        for norm, (training, momentum, tracked) in zip(norms, kept, strict=True):
            norm.train(training)
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)
