"""The task of a command: named, that of the run a file came from, or random inputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rarefy.errors import RecipeError

if TYPE_CHECKING:
    from rarefy.task import Task

task_option = click.option(
    "--task", "task_reference", metavar="REF", help="Task, such as data:mnist-5k [default: the run's]."
)

inputs_option = click.option(
    "--input",
    "shapes",
    multiple=True,
    metavar="SHAPE",
    help="In the place of a task: random numbers for an argument of the model, such as 8x3x224x224 for 8 samples, or "
    "8x128:30000 for integers below 30000. Repeatable, in the order of the arguments.",
)
_SHAPE = re.compile(r"([1-9]\d*(?:x[1-9]\d*)*)(?::([1-9]\d*))?")


def find_task(reference: str | None, file: Path, *, needed: bool, shapes: tuple[str, ...] = ()) -> Task | None:
    """Return the task of a reference, random inputs of shapes, or else the task of the run `file` belongs to.

    Raises `RecipeError` when one is needed and there is none.
    """
    from rarefy_schemas import TaskReference

    from rarefy import yaml
    from rarefy.references import build_task

    if reference is not None and shapes:
        raise click.UsageError("--task brings inputs of its own; leave out --input")
    if reference is not None:
        return build_task(TaskReference(source=reference))
    if shapes:
        return _random(shapes)
    recipe = file.parent.parent / "recipe.yaml"
    if recipe.exists():
        task = yaml.read(recipe).data.get("task")
        if task:
            return build_task(TaskReference.model_validate(task))
    if needed:
        raise RecipeError(
            f"which task? name one with --task, such as data:mnist-5k (no run's recipe lies beside {file}), or give "
            "random inputs with --input, such as 8x3x224x224"
        )
    return None


def _random(shapes: tuple[str, ...]) -> Task:
    import torch

    from rarefy.tasks import InputsTask

    draw, inputs = torch.Generator().manual_seed(0), []
    for text in shapes:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise click.UsageError(f"--input {text}: write a shape such as 8x3x224x224, or 8x128:30000 for integers")
        shape, below = [int(size) for size in match[1].split("x")], int(match[2] or 0)
        try:
            inputs.append(torch.randint(below, shape, generator=draw) if below else torch.randn(shape, generator=draw))
        except RuntimeError as error:  # torch's kind for a lack of memory
            raise RecipeError(f"--input {text}: there is no room for so many numbers") from error
    return InputsTask.of(*inputs)
