"""Random changes of the images that a model is trained on."""

from __future__ import annotations

from typing import Any

import torch
from rarefy_schemas import Augment
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from rarefy.errors import StageError
from rarefy.task import Task


def augmented(batch: Any, task: Task, config: Augment) -> Any:
    """Return a batch of the task with its images moved and mirrored, each by a chance of its own.

    Raises `StageError` when the inputs are no images, or have labels that would have to move along.
    """
    images = [x for x in tree_leaves(task.inputs(batch)) if isinstance(x, torch.Tensor)]
    if len(images) != 1 or images[0].dim() != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in images)
        raise StageError(
            f"`augment` is for one input of images, (samples, channels, height, width), and this task has {shapes}; "
            "leave it out, and change samples at random in the data set"
        )
    if task.has_labels and task.labels(batch).dim() != 1:
        raise StageError("`augment` moves images and no labels, and this task has a label per position; leave it out")
    if not any(leaf is images[0] for leaf in tree_leaves(batch)):
        raise StageError(
            "`augment` changes what is in a batch, and this task works its inputs out of that; leave it out"
        )
    changed = images[0]
    if config.flip:
        changed = flipped(changed)
    if config.shift:
        changed = shifted(changed, config.shift)
    return tree_map(lambda leaf: changed if leaf is images[0] else leaf, batch)


def flipped(images: torch.Tensor) -> torch.Tensor:
    """Return the images `(samples, channels, height, width)`, one in two mirrored left to right."""
    chosen = torch.rand(len(images)) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def shifted(images: torch.Tensor, most: int) -> torch.Tensor:
    """Return the images `(samples, channels, height, width)`, each moved by up to `most` pixels along either axis.

    Zeros move in. Raises `StageError` when that can leave nothing of an image.
    """
    samples, channels, height, width = images.shape
    if most >= min(height, width):
        raise StageError(f"`augment.shift` of {most} pixels can move images of {height} x {width} out of sight")
    start = torch.randint(0, 2 * most + 1, (2, samples, 1)).to(images.device)
    rows, columns = (
        at + torch.arange(size, device=images.device) for at, size in zip(start, (height, width), strict=True)
    )
    sample = torch.arange(samples, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return F.pad(images, (most,) * 4)[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
