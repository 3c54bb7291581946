"""The `.rarefy` artifact as an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rarefy import artifact
from rarefy.exporter import Exporter
from rarefy.exporters.config import RarefyFormat
from rarefy.modules import Base
from rarefy.task import Task


class RarefyExporter(Exporter[RarefyFormat]):
    """Lossless, so the outputs are the very same."""

    suffix = ".rarefy"
    tolerance = 1e-6

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Write the artifact."""
        artifact.write(model, base, path, self.config.coder)

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Load the artifact."""
        return artifact.load(path, base=base.build)
