"""The `.pt2` file of torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.exporter import Exporter
from rarefy.exporters.batching import quiet, traced_inputs
from rarefy.exporters.config import TorchExportFormat
from rarefy.modules import Base
from rarefy.task import Task


class TorchExporter(Exporter[TorchExportFormat]):
    """Writes the traced graph with its weights."""

    suffix = ".pt2"

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Trace the model and write it."""
        inputs, dynamic = traced_inputs(task, self.config.dynamic_batch)
        with quiet():
            torch.export.save(torch.export.export(model, inputs, dynamic_shapes=dynamic), path)

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Load the graph."""
        with quiet():
            return torch.export.load(path).module()
