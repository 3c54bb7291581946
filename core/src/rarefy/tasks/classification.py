"""Classification over arrays, tensors or data sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rarefy_schemas import Split
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from rarefy.errors import RecipeError
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.seeds import derive, seeded
from rarefy.tasks.splits import set_aside

Data = tuple[Any, Any]
IGNORED = -100
"""Label of a place that does not count, as in torch."""


class _Batches(Dataset[Any]):
    """A data set that a loader may index by a whole batch; a batch is a list of tensors."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Any:
        if isinstance(self.data, TensorDataset):  # one gather instead of a sample at a time
            return [tensor[torch.as_tensor(indices)] for tensor in self.data.tensors]
        batch = torch.utils.data.default_collate([self.data[i] for i in indices])
        return batch if isinstance(batch, list | tuple) else [batch]


def _whole(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class ClassificationTask:
    """Inputs and class labels; cross-entropy and accuracy (share, 0 to 1).

    A sample has one label, or one per position, as the next tokens of a text: `(samples, *positions)`. The classes are
    the last dimension of the logits, `(samples, *positions, classes)`.
    """

    splits: dict[Split, Dataset[Any]]
    """Each yields (input, label), or (input,) without labels."""
    batch_size: int = 64
    has_labels: bool = True
    metric: str = "accuracy"
    higher_is_better: bool = True

    @classmethod
    def from_arrays(
        cls,
        inputs: Any,
        labels: Any,
        *,
        validation: Data | None = None,
        test: Data | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> ClassificationTask:
        """Make a task of arrays or tensors, first dimension samples; `labels` may be None.

        Where `test` or `validation`, pairs of inputs and labels, are absent, a fifth of the samples and a tenth of the
        rest are set aside by `seed`, each class in proportion. Values of double precision become single.
        With a label per position chance sets samples aside, and the label -100 marks places that do not count.
        Raises `RecipeError` when sizes do not match, labels are no class numbers, values are not finite, or there are
        too few samples.
        """
        return cls.from_datasets(
            _tensors((inputs, labels), "train"),
            validation=None if validation is None else _tensors(validation, "validation"),
            test=None if test is None else _tensors(test, "test"),
            batch_size=batch_size,
            seed=seed,
        )

    @classmethod
    def from_datasets(
        cls,
        train: Dataset[Any],
        *,
        validation: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> ClassificationTask:
        """Make a task of data sets that yield (input, label), or inputs alone.

        Splits that are absent are set aside as in `from_arrays`; a data set tells the labels of all its samples at once
        by an attribute `targets`, without which the classes' proportions are left to chance.
        """
        splits: dict[Split, Dataset[Any]] = {"train": train}
        given: tuple[tuple[Split, Dataset[Any] | None, float], ...] = (
            ("test", test, 0.2),
            ("validation", validation, 0.1),
        )
        for name, data, share in given:
            if data is None:
                splits["train"], data = set_aside(splits["train"], share, derive(seed, name), name)
            splits[name] = data
        return cls(splits, batch_size, _labelled(splits))

    def loader(
        self, split: Split, batch_size: int | None = None, *, shuffle: bool = False, seed: int = 0
    ) -> DataLoader[Any]:
        """Return the batches of a split; the same seed gives the same order."""
        data = _Batches(self.splits[split])
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
        size = min(batch_size or self.batch_size, max(1, len(data)))
        return DataLoader(data, size, sampler=sampler, collate_fn=_whole, generator=generator)

    def calibration(self, batch_size: int | None = None, batches: int = 8) -> Iterator[tuple[Any, ...]]:
        """Yield the inputs of the first `batches` batches of the training split, in a fixed random order."""
        for count, batch in enumerate(self.loader("train", batch_size, shuffle=True, seed=0)):
            if count == batches:
                return
            yield self.inputs(batch)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return the model's only argument."""
        return (batch[0],)

    def labels(self, batch: Any) -> torch.Tensor:
        """Return the class numbers, `(samples, *positions)`; raise `RecipeError` when there are none."""
        if not self.has_labels:
            raise RecipeError("this task has no labels; use an objective or a technique that needs none")
        return batch[1]  # type: ignore[no-any-return]

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the mean cross-entropy of logits `(samples, *positions, classes)`."""
        labels = self.labels(batch).to(outputs.device)
        if outputs.shape[:-1] != labels.shape:
            raise RecipeError(
                f"logits of shape {tuple(outputs.shape)} do not fit labels of shape {tuple(labels.shape)}: they need a "
                "last dimension more, the classes"
            )
        return nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split) -> float:
        """Return the share of labels that have the largest logit; NaN without labels."""
        if not self.has_labels:
            return math.nan
        device, right, total = device_of(model), 0, 0
        with evaluation(model):
            for batch in self.loader(split, max(self.batch_size, 256)):
                labels = self.labels(batch).to(device)
                best = model(*move(self.inputs(batch), device)).argmax(-1)
                right += int((best == labels).sum())
                total += int((labels != IGNORED).sum())
        return right / total if total else math.nan

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, ...]:
        """Return the first inputs of the training split, repeated when there are too few."""
        data = _Batches(self.splits["train"])
        with seeded(0):  # a data set may augment its samples at random
            return self.inputs(data.__getitems__([i % len(data) for i in range(batch_size)]))


def _tensors(data: Data, split: str) -> TensorDataset:
    inputs, labels = data
    x = _tensor(inputs)
    if x.dim() == 0 or len(x) == 0:
        raise RecipeError(f"the split {split!r} is empty")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise RecipeError(f"the inputs of the split {split!r} have values that are NaN or infinite")
    if labels is None:
        return TensorDataset(x)
    y = _tensor(labels)
    if y.shape == (len(x), 1):
        y = y.flatten()
    if len(y) != len(x):
        raise RecipeError(f"the split {split!r} has {len(x)} inputs and labels of shape {tuple(y.shape)}")
    if y.is_floating_point() or ((y < 0) & (y != IGNORED)).any():
        raise RecipeError(f"the labels of the split {split!r} must be class numbers from 0 on, or {IGNORED} for none")
    return TensorDataset(x, y.long())


def _tensor(values: Any) -> torch.Tensor:
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # torch has no read-only tensors
    tensor = torch.as_tensor(values)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _labelled(splits: dict[Split, Dataset[Any]]) -> bool:
    """Tell whether all splits have labels; raise `RecipeError` when a split is empty or only some have."""
    found = set()
    for name, data in splits.items():
        if len(data) == 0:  # type: ignore[arg-type]
            raise RecipeError(f"the split {name!r} is empty")
        with seeded(0):
            found.add(len(_Batches(data)[0]) > 1)
    if len(found) > 1:
        raise RecipeError("some splits have labels and others have none; give labels to all or to none")
    return found.pop()
