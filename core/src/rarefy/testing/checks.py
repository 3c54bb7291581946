"""The kit without pytest: one call that raises `AssertionError` with every rule that is broken."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from rarefy_schemas import ExporterConfig, Noun, ObjectiveConfig, TechniqueConfig
from torch import nn

from rarefy.errors import PluginError, did_you_mean
from rarefy.registry import get
from rarefy.task import Task
from rarefy.testing.exporters import ExporterConformance
from rarefy.testing.nouns import NounConformance
from rarefy.testing.objectives import ObjectiveConformance
from rarefy.testing.techniques import TechniqueConformance


def check_technique(
    technique: TechniqueConfig | type[TechniqueConfig] | str,
    options: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
) -> None:
    """Check a technique, given its config, the config's class, or its registered name, with `options` for the latter.

    Raises `AssertionError` with all broken rules.
    """
    _check(TechniqueConformance, _config(technique, options, get().techniques), model, task)


def check_objective(
    objective: ObjectiveConfig | type[ObjectiveConfig] | str,
    options: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
) -> None:
    """Check an objective; arguments and errors as of `check_technique`."""
    _check(ObjectiveConformance, _config(objective, options, get().objectives), model, task)


def check_exporter(
    exporter: ExporterConfig | type[ExporterConfig] | str,
    options: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
) -> None:
    """Check an exporter; arguments and errors as of `check_technique`."""
    _check(ExporterConformance, _config(exporter, options, get().exporters), model, task)


def _config(given: Noun | type[Noun] | str, options: Mapping[str, Any] | None, known: Mapping[str, type[Noun]]) -> Noun:
    if isinstance(given, Noun):
        return given
    if isinstance(given, str):
        if given not in known:
            raise PluginError(f"{given!r} is not registered. {did_you_mean(given, known)}")
        given = known[given]
    return given(**(options or {}))


def _check(kit: type[NounConformance], config: Noun, model: nn.Module | None, task: Task | None) -> None:
    members: dict[str, Any] = {"config": config}
    if model is not None:
        members["model"] = lambda self: copy.deepcopy(model)
    if task is not None:
        members["task"] = lambda self: task
    rules = type(kit.__name__, (kit,), members)()
    broken: dict[str, Exception] = {}
    for name in (name for name in dir(rules) if name.startswith("test_")):
        try:
            getattr(rules, name)()
        except Exception as error:  # the plugin's code runs here and may raise anything
            broken[name] = error
    if broken:
        told = "\n\n".join(f"{name}: {_told(error)}" for name, error in broken.items())
        count = "1 rule" if len(broken) == 1 else f"{len(broken)} rules"
        raise AssertionError(f"{type(config).__name__} breaks {count}\n\n{told}") from next(iter(broken.values()))


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
