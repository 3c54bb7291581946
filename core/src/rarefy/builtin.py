"""The nouns that core itself provides, by the same door as any plugin's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rarefy.hookspecs import hookimpl

if TYPE_CHECKING:
    from rarefy_schemas import ExporterConfig, ObjectiveConfig, SourceConfig, TechniqueConfig


@hookimpl
def register_techniques() -> Iterable[type[TechniqueConfig]]:
    """Register the steps that belong to no family."""
    from rarefy.preparation.config import LinearLayersConfig
    from rarefy.recovery.config import BatchNormConfig

    return [LinearLayersConfig, BatchNormConfig]


@hookimpl
def register_objectives() -> Iterable[type[ObjectiveConfig]]:
    """Register the task's own loss."""
    from rarefy_schemas import TaskLoss

    return [TaskLoss]


@hookimpl
def register_exporters() -> Iterable[type[ExporterConfig]]:
    """Register the formats that core writes."""
    from rarefy.exporters.config import EXPORTERS

    return EXPORTERS


@hookimpl
def register_sources() -> Iterable[type[SourceConfig]]:
    """Register the zoo and the data sets."""
    from rarefy.sources import SOURCES

    return SOURCES
