"""What a model is for: data, loss and metric. A small protocol, with one ready task in `rarefy.tasks`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from rarefy_schemas import Split
from torch import nn
from torch.utils.data import DataLoader


@runtime_checkable
class Task(Protocol):
    """Data, loss and metric."""

    @property
    def metric(self) -> str:
        """Name of the metric, such as `accuracy`."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is a better one."""

    @property
    def has_labels(self) -> bool:
        """Whether `loss` can be computed."""

    def loader(
        self, split: Split, batch_size: int | None = None, *, shuffle: bool = False, seed: int = 0
    ) -> DataLoader[Any]:
        """Return the batches of a split; the same seed gives the same order."""

    def calibration(self, batch_size: int | None = None, batches: int = 8) -> Iterator[tuple[Any, ...]]:
        """Yield the model inputs of a few batches of the training split."""

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the positional arguments of the model for a batch."""

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the scalar mean loss of `outputs` on `batch`."""

    def labels(self, batch: Any) -> torch.Tensor:
        """Return the labels of a batch, `(samples, ...)`."""

    def score(self, model: nn.Module, split: Split) -> float:
        """Return the metric of `model` on a split; training mode is restored."""

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, ...]:
        """Return positional arguments of the model, the same at every call."""
