"""The extension points. Nouns are registered; verbs are the five stages, each with a default in `stages.py`.

A noun is registered by its torch-free half, a subclass of a config of `rarefy_schemas`; its `implementation` names
the class that does the work. Every verb may be overridden or wrapped by any plugin.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from rarefy_schemas import (
        Evaluate,
        ExporterConfig,
        ExportReport,
        Finetune,
        Measurement,
        ObjectiveConfig,
        SourceConfig,
        TechniqueConfig,
    )
    from torch import nn

    from rarefy.modules import Base
    from rarefy.task import Task
    from rarefy.technique import Analysis, Technique
    from rarefy.training import Trained

hookspec = pluggy.HookspecMarker("rarefy")
hookimpl = pluggy.HookimplMarker("rarefy")


@hookspec
def register_techniques() -> Iterable[type[TechniqueConfig]]:  # type: ignore[empty-body]
    """Return the techniques that a recipe step can name."""


@hookspec
def register_objectives() -> Iterable[type[ObjectiveConfig]]:  # type: ignore[empty-body]
    """Return the losses that fine-tuning can minimise."""


@hookspec
def register_exporters() -> Iterable[type[ExporterConfig]]:  # type: ignore[empty-body]
    """Return the target formats of `export`."""


@hookspec
def register_sources() -> Iterable[type[SourceConfig]]:  # type: ignore[empty-body]
    """Return the schemes of model and task references."""


@hookspec(firstresult=True)
def analyze(technique: Technique[Any], model: nn.Module, task: Task) -> Analysis | None:
    """Say what `technique` would do to `model`, leaving the model bitwise as it is."""


@hookspec(firstresult=True)
def transform(technique: Technique[Any], model: nn.Module, analysis: Analysis, task: Task) -> nn.Module | None:
    """Return the changed model; `model` is a copy that may be changed in place and returned."""


@hookspec(firstresult=True)
def finetune(
    technique: Technique[Any] | None, model: nn.Module, teacher: nn.Module, task: Task, config: Finetune, seed: int
) -> Trained | None:
    """Train `model` in place under the technique's rule and return it with the history of the training."""


@hookspec
def evaluate(  # type: ignore[empty-body]
    model: nn.Module, original: nn.Module, task: Task, config: Evaluate
) -> Iterable[Measurement]:
    """Measure `model` beside `original`; the answers of all plugins are collected."""


@hookspec(firstresult=True)
def export(
    model: nn.Module, base: Base, task: Task, config: ExporterConfig, directory: Path, original_bytes: int
) -> ExportReport | None:
    """Write `model` in the format of `config` into `directory`, re-open it, compare, and report."""
