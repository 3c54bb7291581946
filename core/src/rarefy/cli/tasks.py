"""The task of a command: named, or that of the run a file came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rarefy.errors import RecipeError

if TYPE_CHECKING:
    from rarefy.task import Task

task_option = click.option(
    "--task", "task_reference", metavar="REF", help="Task, such as data:mnist-5k [default: the run's]."
)


def find_task(reference: str | None, file: Path, *, needed: bool) -> Task | None:
    """Return the task of a reference, or else that of the run `file` belongs to; raise `RecipeError` if needed."""
    from rarefy_schemas import TaskReference

    from rarefy import yaml
    from rarefy.references import build_task

    if reference is not None:
        return build_task(TaskReference(source=reference))
    recipe = file.parent.parent / "recipe.yaml"
    if recipe.exists():
        task = yaml.read(recipe).data.get("task")
        if task:
            return build_task(TaskReference.model_validate(task))
    if needed:
        raise RecipeError(
            f"which task? name one with --task, such as data:mnist-5k (no run's recipe lies beside {file})"
        )
    return None
