"""Tasks hand out the same data for the same seed, and refuse data they cannot use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from rarefy.errors import RecipeError
from rarefy.task import Task
from rarefy.tasks import ClassificationTask
from rarefy.tasks.splits import split_indices
from torch import nn
from torch.utils.data import TensorDataset

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(100, 4)).astype(np.float32), np.arange(100) % 5


def order(loader: Any) -> list[float]:
    return [float(value) for batch in loader for value in batch[0][:, 0]]


def test_arrays_become_a_task_with_stratified_splits() -> None:
    task = ClassificationTask.from_arrays(X, Y, batch_size=8)
    assert isinstance(task, Task)
    parts = {
        split: torch.cat([task.labels(b) for b in task.loader(split)]) for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 72, "validation": 8, "test": 20}
    assert all(part.bincount().max() - part.bincount().min() <= 1 for part in parts.values())
    everything = sorted(value for split in parts for value in order(task.loader(split)))
    assert everything == sorted(float(x) for x in X[:, 0])


def test_the_seed_decides_the_order() -> None:
    task = ClassificationTask.from_arrays(X, Y, batch_size=8)
    plain = order(task.loader("train"))
    shuffled = order(task.loader("train", shuffle=True, seed=1))
    assert order(task.loader("train", shuffle=True, seed=1)) == shuffled != plain
    assert order(task.loader("train", shuffle=True, seed=2)) != shuffled
    assert sorted(shuffled) == sorted(plain)
    assert [len(batch[0]) for batch in task.loader("train", 32)] == [32, 32, 8]
    assert [len(inputs) for (inputs,) in task.calibration(16, 2)] == [16, 16]
    assert torch.equal(task.example_inputs(3)[0], task.example_inputs(3)[0])
    assert len(task.example_inputs(500)[0]) == 500


def test_score_and_loss_by_hand() -> None:
    model = nn.Linear(4, 5).train()
    task = ClassificationTask.from_arrays(X, Y, test=(X, Y))
    expected = (model(torch.from_numpy(X)).argmax(1) == torch.from_numpy(Y)).float().mean()
    assert task.score(model, "test") == pytest.approx(float(expected))
    assert model.training
    batch = next(iter(task.loader("test", 100)))
    by_hand = -torch.log_softmax(model(batch[0]), 1)[range(100), batch[1]].mean()
    assert torch.allclose(task.loss(model(batch[0]), batch), by_hand)


def test_data_sets_and_tasks_without_labels() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, i: int) -> Any:
            return torch.from_numpy(X[i]), int(Y[i])

    pairs = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    task = ClassificationTask.from_datasets(pairs, test=pairs, validation=Rows())
    assert next(iter(task.loader("validation")))[1].tolist() == Y[:10].tolist()
    bare = ClassificationTask.from_arrays(X, None)
    assert not bare.has_labels
    assert math.isnan(bare.score(nn.Linear(4, 5), "test"))
    with pytest.raises(RecipeError, match="no labels"):
        bare.loss(torch.zeros(2, 5), next(iter(bare.loader("train"))))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (X[:0], Y[:0], "is empty"),
        (X, Y[:9], "100 inputs and labels of shape"),
        (X, Y - 1, "class numbers from 0 on"),
        (X, Y / 2, "class numbers from 0 on"),
        (np.full((9, 4), np.nan, np.float32), Y[:9], "NaN or infinite"),
    ],
)
def test_wrong_arrays(inputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ClassificationTask.from_arrays(inputs, labels)
    with pytest.raises(RecipeError, match="some splits have labels"):
        ClassificationTask.from_arrays(X, Y, test=(X, None))


def test_a_data_set_is_split_by_the_targets_it_tells() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        targets = Y.tolist()

        def __len__(self) -> int:
            return 100

        def __getitem__(self, i: int) -> Any:
            return torch.from_numpy(X[i]) + torch.rand(4), int(Y[i])

    task = ClassificationTask.from_datasets(Rows(), batch_size=100)
    for split, counts in (("train", {14, 15}), ("validation", {1, 2}), ("test", {4})):
        assert set(next(iter(task.loader(split)))[1].bincount().tolist()) == counts
    # though the data set adds noise
    assert torch.equal(task.example_inputs(3)[0], task.example_inputs(3)[0])


def test_a_data_set_of_inputs_alone_has_no_labels() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, i: int) -> Any:
            return torch.from_numpy(X[i])

    task = ClassificationTask.from_datasets(Rows())
    assert not task.has_labels
    assert [tuple(inputs.shape) for (inputs,) in task.calibration(16, 2)] == [(16, 4), (16, 4)]


def test_many_small_classes_are_set_aside_in_proportion() -> None:
    labels = torch.arange(100).repeat(4)
    kept, aside = split_indices(labels, (0.9, 0.1), seed=0)
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(400))
    assert len(aside) == 40
    assert labels[aside].bincount().max() == 1
    assert not torch.equal(aside, split_indices(labels, (0.9, 0.1), seed=1)[1])


def test_numbers_of_double_precision_read_only_arrays_and_columns_of_labels() -> None:
    inputs = X.astype(np.float64)
    inputs.flags.writeable = False
    task = ClassificationTask.from_arrays(inputs, Y[:, None].astype(np.uint8))
    (x, y) = next(iter(task.loader("train")))
    assert (x.dtype, y.dtype, y.dim()) == (torch.float32, torch.int64, 1)


def test_scoring_leaves_every_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout()).train()
    model[1].eval()
    ClassificationTask.from_arrays(X, Y).score(model, "test")
    assert [module.training for module in model.modules()] == [True, True, False]


def test_too_few_samples_to_set_some_aside() -> None:
    with pytest.raises(RecipeError, match="too few to set 10% aside for the split 'validation'"):
        ClassificationTask.from_arrays(X[:3], Y[:3])
    assert ClassificationTask.from_arrays(X[:3], Y[:3], validation=(X, Y), test=(X, Y)).has_labels


class TestPositions:
    """A label per position of a sample, as the next tokens of a text."""

    def test_loss_and_score_count_every_position_that_has_a_label(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(7, (40, 6), generator=generator)
        labels[:, -1] = -100
        task = ClassificationTask.from_arrays(torch.arange(40).view(-1, 1), labels, batch_size=8)
        logits = torch.randn(40, 6, 7, generator=generator)
        model = nn.Module()
        model.forward = lambda rows: logits[rows.flatten()]  # type: ignore[method-assign]
        for split in ("train", "validation", "test"):
            chosen = torch.cat([x.flatten() for x, _ in task.loader(split)])
            right = (logits[chosen].argmax(-1) == labels[chosen]).sum()
            assert task.score(model, split) == pytest.approx(int(right) / (5 * len(chosen)))
        batch = next(iter(task.loader("train")))
        rows = batch[0].flatten()
        expected = torch.stack([
            nn.functional.cross_entropy(logits[row, place], labels[row, place]) for row in rows for place in range(5)
        ]).mean()  # fmt: skip
        torch.testing.assert_close(task.loss(model(batch[0]), batch), expected)

    def test_logits_of_another_shape_are_told(self) -> None:
        task = ClassificationTask.from_arrays(torch.zeros(20, 3), torch.zeros(20, 4, dtype=torch.long))
        with pytest.raises(RecipeError, match=r"logits of shape \(14, 9, 4\) do not fit labels of shape \(14, 4\)"):
            task.loss(torch.zeros(14, 9, 4), next(iter(task.loader("train"))))

    def test_a_split_in_which_no_place_counts_has_no_score(self) -> None:
        task = ClassificationTask.from_arrays(torch.zeros(20, 3), torch.full((20, 4), -100))
        model = nn.Module()
        model.forward = lambda x: torch.zeros(len(x), 4, 9)  # type: ignore[method-assign]
        assert math.isnan(task.score(model, "test"))
