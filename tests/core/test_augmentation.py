"""Random changes of the images of a training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rarefy.augmentation import augmented, flipped, shifted
from rarefy.errors import RecipeError, StageError
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy.training import fit
from rarefy_distillation.config import LogitsConfig
from rarefy_schemas import Augment, Finetune
from torch import nn


@pytest.fixture
def images() -> torch.Tensor:
    """Return 300 images of 2 channels in which every pixel is another number."""
    torch.manual_seed(0)
    return torch.arange(1, 1 + 2 * 5 * 6).float().reshape(1, 2, 5, 6).repeat(300, 1, 1, 1)


def test_images_move_as_one_and_zeros_move_in(images: torch.Tensor) -> None:
    moved, met = shifted(images, 2), set()
    assert moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        row, column = ((after[0] == before[0, 2, 3]).nonzero()[0] - torch.tensor([2, 3])).tolist()
        met.add((row, column))
        wanted = torch.zeros_like(before)
        for y in range(5):
            for x in range(6):
                if 0 <= y - row < 5 and 0 <= x - column < 6:
                    wanted[:, y, x] = before[:, y - row, x - column]
        assert torch.equal(after, wanted)
    assert met == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


def test_one_image_in_two_is_mirrored(images: torch.Tensor) -> None:
    mirror, found = images[0].flip(2), flipped(images)
    mirrored = [torch.equal(after, mirror) for after in found]
    assert all(turned or torch.equal(after, images[0]) for after, turned in zip(found, mirrored, strict=True))
    assert 100 < sum(mirrored) < 200


def task_of(x: torch.Tensor, y: torch.Tensor) -> ClassificationTask:
    return ClassificationTask.from_arrays(x, y, validation=(x, y), test=(x, y), batch_size=20)


class Watched(nn.Module):
    """A network that keeps what it is given in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(60, 2), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.layer(x.flatten(1))


def test_student_and_teacher_see_the_same_changed_images_and_validation_the_given_ones(images: torch.Tensor) -> None:
    task = task_of(images[:60], torch.arange(60) % 2)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model, teacher = Watched(), Watched()
        config = Finetune(augment=Augment(shift=1, flip=True), objective=LogitsConfig(alpha=0.5), epochs=1)
        fit(model, teacher, task, config, seed=seed)
        *trained, validated = model.seen
        assert len(trained) == len(teacher.seen) == 3
        assert all(torch.equal(one, other) for one, other in zip(trained, teacher.seen, strict=True))
        assert not any(torch.equal(x, images[:20]) for x in trained)
        assert torch.equal(validated, images[:60])
        results.append(torch.cat(trained))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_training_without_it_sees_the_images_as_they_are(images: torch.Tensor) -> None:
    model = Watched()
    fit(model, copy.deepcopy(model), task_of(images[:20], torch.arange(20) % 2), Finetune())
    assert all(torch.equal(x, images[:20]) for x in model.seen)


@pytest.mark.parametrize(
    ("x", "y", "shift", "words"),
    [
        (torch.randn(20, 6), torch.arange(20) % 2, 1, "this task has \\(20, 6\\)"),
        (torch.randn(20, 1, 4, 4), torch.zeros(20, 4, 4, dtype=torch.long), 1, "a label per position"),
        (torch.randn(20, 1, 4, 9), torch.arange(20) % 2, 4, "images of 4 x 9 out of sight"),
    ],
    ids=["no images", "labels that would have to move", "too far"],
)
def test_what_cannot_be_moved_is_refused(x: torch.Tensor, y: torch.Tensor, shift: int, words: str) -> None:
    task = task_of(x, y)
    batch = next(iter(task.loader("train")))
    with pytest.raises(StageError, match=words):
        augmented(batch, task, Augment(shift=shift))


def test_inputs_that_are_not_in_the_batch_are_refused(images: torch.Tensor) -> None:
    class Scaled(ClassificationTask):
        def inputs(self, batch: Any) -> tuple[Any, ...]:
            return (batch[0] / 255,)

    plain = task_of(images[:20], torch.arange(20) % 2)
    task = Scaled(plain.splits, plain.batch_size, plain.has_labels)
    with pytest.raises(StageError, match="works its inputs out"):
        augmented(next(iter(task.loader("train"))), task, Augment(flip=True))


def test_an_empty_choice_is_refused() -> None:
    step = {"technique": "pruning/magnitude", "amount": 0.5, "finetune": {"augment": {}}}
    with pytest.raises(RecipeError, match="give `shift`, a number of pixels, or `flip: true`"):
        load_recipe({"steps": [step]})
