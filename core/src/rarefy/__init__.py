"""rarefy: compress trained PyTorch models with one recipe, one report and one file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rarefy.api import analyze as analyze
    from rarefy.api import begin as begin
    from rarefy.api import compress as compress
    from rarefy.api import export as export
    from rarefy.api import gain as gain
    from rarefy.api import transform as transform
    from rarefy.artifact import load as load
    from rarefy.errors import ArtifactError as ArtifactError
    from rarefy.errors import PluginError as PluginError
    from rarefy.errors import RarefyError as RarefyError
    from rarefy.errors import RecipeError as RecipeError
    from rarefy.errors import StageError as StageError
    from rarefy.exporter import Exporter as Exporter
    from rarefy.hookspecs import hookimpl as hookimpl
    from rarefy.modules.derived import plain as plain
    from rarefy.objective import Objective as Objective
    from rarefy.recipe import load_recipe as load_recipe
    from rarefy.source import Source as Source
    from rarefy.step import Step as Step
    from rarefy.task import Task as Task
    from rarefy.tasks import ClassificationTask as ClassificationTask
    from rarefy.tasks import InputsTask as InputsTask
    from rarefy.technique import Analysis as Analysis
    from rarefy.technique import LayerTechnique as LayerTechnique
    from rarefy.technique import Plan as Plan
    from rarefy.technique import Skip as Skip
    from rarefy.technique import Technique as Technique
    from rarefy.technique import TrainingRule as TrainingRule

__version__ = "0.1.0"

# `import rarefy` stays light: each name is imported when it is first used
_HOMES = {
    "analyze": "api",
    "begin": "api",
    "compress": "api",
    "export": "api",
    "gain": "api",
    "transform": "api",
    "load": "artifact",
    "ArtifactError": "errors",
    "PluginError": "errors",
    "RarefyError": "errors",
    "RecipeError": "errors",
    "StageError": "errors",
    "Exporter": "exporter",
    "hookimpl": "hookspecs",
    "plain": "modules.derived",
    "Objective": "objective",
    "load_recipe": "recipe",
    "Source": "source",
    "Step": "step",
    "Task": "task",
    "ClassificationTask": "tasks",
    "InputsTask": "tasks",
    "Analysis": "technique",
    "LayerTechnique": "technique",
    "Plan": "technique",
    "Skip": "technique",
    "Technique": "technique",
    "TrainingRule": "technique",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"rarefy.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rarefy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
