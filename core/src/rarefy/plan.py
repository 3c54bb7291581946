"""What a recipe would do, told without data, weights or work: `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rarefy_schemas import Finetune, Recipe

from rarefy.errors import RecipeError, StageError
from rarefy.measure import flops, parameters
from rarefy.nouns import implement
from rarefy.references import build_model, build_task
from rarefy.technique import Technique, select


@dataclass(frozen=True)
class PlanRow:
    """The model as it is expected to be after one stage."""

    step: str
    technique: str
    parameters: int
    flops: int
    """FLOPs (2 x MACs) of a forward pass at batch size 1."""
    epochs: int
    note: str = ""


def plan(recipe: Recipe) -> list[PlanRow]:
    """Return a row for the original and one per step, computed on the meta device."""
    if recipe.model is None or recipe.task is None:
        raise RecipeError("a dry run needs a recipe that names its `model` and its `task`")
    with torch.device("meta"):
        model = build_model(recipe.model)
    inputs = build_task(recipe.task).example_inputs(1)
    rows = [
        PlanRow("original", "", parameters(model), flops(model, inputs), _epochs(recipe.train_first), "trained first")
        if recipe.train_first
        else PlanRow("original", "", parameters(model), flops(model, inputs), 0)
    ]
    for index, config in enumerate(part for step in recipe.steps for part in step.parts()):
        technique: Technique[Any] = implement(config)
        note = ""
        if not config.traits.new_architecture:
            try:
                note = f"{len(list(select(model, config)))} target layers"
            except StageError as error:
                raise RecipeError(f"steps.{index}: {error}") from error
        before = model
        model = technique.predict(model)
        if config.traits.changes_shapes and model is before:
            note += "; depends on the weights, so the figures are those before the step"
        elif config.traits.makes_zeros:
            note += "; zeros are not counted as fewer parameters"
        name = config.name or config.registered_name()
        rows.append(
            PlanRow(
                name, config.registered_name(), parameters(model), flops(model, inputs), _epochs(config.finetune), note
            )
        )
    return rows


def _epochs(finetune: Finetune | None) -> int:
    return finetune.epochs if finetune is not None else 0
