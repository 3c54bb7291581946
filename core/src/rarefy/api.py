"""The library's front door: what the command line does, in five lines of Python."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy_schemas import Recipe, TechniqueConfig
from torch import nn

from rarefy.nouns import implement
from rarefy.pipeline import Result, run
from rarefy.recipe import load_recipe
from rarefy.task import Task
from rarefy.technique import Analysis, Technique


def compress(
    model: nn.Module | None,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    task: Task | None = None,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Compress `model` by `recipe` and return the new model with its report; `model` itself stays as it is.

    `model` and `task` may be None when the recipe names them. Without `directory` the run's files go to a new
    temporary folder, named in the result.
    Raises `RecipeError` for a wrong recipe and `StageError` when a step fails.
    """
    folder = Path(directory) if directory is not None else Path(tempfile.mkdtemp(prefix="rarefy-"))
    return run(load_recipe(recipe), folder, model=model, task=task, resume=resume)


def analyze(model: nn.Module, technique: TechniqueConfig | Mapping[str, Any], task: Task) -> Analysis:
    """Say what a technique would do to each layer of `model`, without changing it."""
    config = technique
    if not isinstance(config, TechniqueConfig):
        config = load_recipe({"steps": [dict(config)]}).steps[0]
    worker: Technique[Any] = implement(config)
    return worker.analyze(model, task)
