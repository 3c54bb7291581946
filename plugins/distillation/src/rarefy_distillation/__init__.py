"""Knowledge distillation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rarefy.hookspecs import hookimpl

if TYPE_CHECKING:
    from rarefy_schemas import ObjectiveConfig, TechniqueConfig


@hookimpl
def register_techniques() -> Iterable[type[TechniqueConfig]]:
    """Register the techniques of the family."""
    from rarefy_distillation.config import StudentConfig

    return [StudentConfig]


@hookimpl
def register_objectives() -> Iterable[type[ObjectiveConfig]]:
    """Register the losses of the family, which any step can fine-tune with."""
    from rarefy_distillation.config import LogitsConfig

    return [LogitsConfig]
