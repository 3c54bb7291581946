"""Classification over arrays, tensors or data sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rarefy_schemas import Split
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from rarefy.errors import RecipeError
from rarefy.seeds import derive

Data = tuple[Any, Any]


class _Batches(Dataset[Any]):
    """A data set that a loader may index by a whole batch."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Any:
        if isinstance(self.data, TensorDataset):  # one gather instead of a sample at a time
            return [tensor[torch.as_tensor(indices)] for tensor in self.data.tensors]
        return torch.utils.data.default_collate([self.data[i] for i in indices])


def _whole(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class ClassificationTask:
    """Inputs and class labels; cross-entropy and accuracy (share, 0 to 1)."""

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

        Where `test` or `validation`, pairs of inputs and labels, are absent, a fifth and a tenth of the samples are set
        aside by `seed`, each class in proportion. Raises `RecipeError` when sizes do not match, labels are no class
        numbers, or values are not finite.
        """
        train = _tensors((inputs, labels), "train")
        parts: dict[Split, tuple[torch.Tensor, ...]] = {}
        for name, given, share in (("test", test, 0.2), ("validation", validation, 0.1)):
            if given is None:
                train, parts[name] = _set_aside(train, share, derive(seed, name))  # type: ignore[index]
            else:
                parts[name] = _tensors(given, name)  # type: ignore[index]
        parts["train"] = train
        labelled = {len(part) == 2 for part in parts.values()}
        if len(labelled) > 1:
            raise RecipeError("some splits have labels and others have none; give labels to all or to none")
        return cls({name: TensorDataset(*part) for name, part in parts.items()}, batch_size, labelled.pop())

    @classmethod
    def from_datasets(
        cls, train: Dataset[Any], test: Dataset[Any], validation: Dataset[Any], *, batch_size: int = 64
    ) -> ClassificationTask:
        """Make a task of data sets that yield (input, label)."""
        return cls({"train": train, "validation": validation, "test": test}, batch_size)

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
        """Return the class numbers, `(samples,)`; raise `RecipeError` when there are none."""
        if not self.has_labels:
            raise RecipeError("this task has no labels; use an objective or a technique that needs none")
        return batch[1]  # type: ignore[no-any-return]

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the mean cross-entropy of logits `(samples, classes)`."""
        return nn.functional.cross_entropy(outputs, self.labels(batch))

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split) -> float:
        """Return the share of samples whose largest logit is the label's; NaN without labels."""
        if not self.has_labels:
            return math.nan
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        was_training, right, total = model.training, 0, 0
        model.eval()
        try:
            for batch in self.loader(split, max(self.batch_size, 256)):
                x, y = (part.to(device) for part in batch)
                right += int((model(x).argmax(-1) == y).sum())
                total += len(y)
        finally:
            model.train(was_training)
        return right / total

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, ...]:
        """Return the first inputs of the training split, repeated when there are too few."""
        data = _Batches(self.splits["train"])
        indices = [i % len(data) for i in range(batch_size)]
        return self.inputs(data.__getitems__(indices))


def _tensors(data: Data, split: str) -> tuple[torch.Tensor, ...]:
    inputs, labels = data
    x = torch.as_tensor(inputs)
    if len(x) == 0:
        raise RecipeError(f"the split {split!r} is empty")
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise RecipeError(f"the inputs of the split {split!r} have values that are NaN or infinite")
    if labels is None:
        return (x,)
    y = torch.as_tensor(labels)
    if y.shape != (len(x),):
        raise RecipeError(f"the split {split!r} has {len(x)} inputs and labels of shape {tuple(y.shape)}")
    if y.is_floating_point() or int(y.min()) < 0:
        raise RecipeError(f"the labels of the split {split!r} must be class numbers from 0 on")
    return (x, y.long())


def _set_aside(
    train: tuple[torch.Tensor, ...], share: float, seed: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    kept, aside = split_indices(train[1] if len(train) == 2 else torch.zeros(len(train[0])), [1 - share, share], seed)
    return tuple(t[kept] for t in train), tuple(t[aside] for t in train)


def split_indices(labels: torch.Tensor, shares: Sequence[float], seed: int) -> list[torch.Tensor]:
    """Return disjoint random index sets with the given shares of every class."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[torch.Tensor]] = [[] for _ in shares]
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        edges = [round(sum(shares[:i]) * len(members)) for i in range(len(shares) + 1)]
        for part, start, end in zip(parts, edges, edges[1:], strict=False):
            part.append(members[start:end])
    return [torch.cat(part).sort().values for part in parts]
