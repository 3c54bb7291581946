"""Core's own answers to the five verbs; each delegates to the noun, and any plugin is asked first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.hookspecs import hookimpl

if TYPE_CHECKING:
    from rarefy_schemas import Evaluate, ExporterConfig, ExportReport, Finetune, Measurement
    from torch import nn

    from rarefy.modules import Base
    from rarefy.task import Task
    from rarefy.technique import Analysis, Technique
    from rarefy.training import Trained


@hookimpl(trylast=True)
def analyze(technique: Technique[Any], model: nn.Module, task: Task) -> Analysis:
    """Ask the technique."""
    return technique.analyze(model, task)


@hookimpl(trylast=True)
def transform(technique: Technique[Any], model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
    """Ask the technique."""
    return technique.transform(model, analysis, task)


@hookimpl(trylast=True)
def finetune(
    technique: Technique[Any] | None, model: nn.Module, teacher: nn.Module, task: Task, config: Finetune, seed: int
) -> Trained:
    """Train with core's loop."""
    from rarefy.rules import rules_for
    from rarefy.training import fit

    return fit(model, teacher, task, config, rules=rules_for(technique, model), seed=seed)


@hookimpl(trylast=True)
def evaluate(model: nn.Module, original: nn.Module, task: Task, config: Evaluate) -> Iterable[Measurement]:
    """Measure metric, size, work and latency."""
    from rarefy.measure import measure

    return measure(model, original, task, config)


@hookimpl(trylast=True)
def export(
    model: nn.Module, base: Base, task: Task, config: ExporterConfig, directory: Path, original_bytes: int
) -> ExportReport:
    """Write with the exporter, re-open the file and compare."""
    from rarefy.exporting import export_one

    return export_one(model, base, task, config, directory, original_bytes)
