"""Schemas of rarefy: recipes, reports and manifests. Depends on pydantic only."""

from pydantic import Field

from rarefy_schemas.base import Noun, Schema
from rarefy_schemas.manifest import ARTIFACT_VERSION, Coder, Coding, Manifest, ModelSpec, ModuleSpec, TensorEntry
from rarefy_schemas.recipe import (
    Budgets,
    Evaluate,
    ExporterConfig,
    ModelReference,
    NamedModel,
    Recipe,
    SourceConfig,
    Split,
    TaskReference,
    TechniqueConfig,
)
from rarefy_schemas.report import (
    REPORT_VERSION,
    BudgetReport,
    ExportReport,
    Histogram,
    LayerReport,
    Measurement,
    Report,
    SkippedLayer,
    StageReport,
)
from rarefy_schemas.targets import Targets
from rarefy_schemas.training import Augment, Finetune, ObjectiveConfig, TaskLoss
from rarefy_schemas.traits import DataNeed, Traits

__all__ = [
    "ARTIFACT_VERSION", "REPORT_VERSION", "Augment", "BudgetReport", "Budgets", "Coder", "Coding", "DataNeed",
    "Evaluate", "ExportReport", "ExporterConfig", "Field", "Finetune", "Histogram", "LayerReport", "Manifest",
    "Measurement", "ModelReference", "ModelSpec", "ModuleSpec", "NamedModel", "Noun", "ObjectiveConfig", "Recipe",
    "Report", "Schema", "SkippedLayer", "SourceConfig", "Split", "StageReport", "Targets", "TaskLoss",
    "TaskReference", "TechniqueConfig", "TensorEntry", "Traits",
]  # fmt: skip
