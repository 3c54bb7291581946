"""torch.export's `.pt2` programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.errors import StageError
from rarefy.exporter import Exporter
from rarefy.exporters.config import TorchExportFormat
from rarefy.modules import Base
from rarefy.task import Task


def exported(model: nn.Module, task: Task, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """Return the traced program of a model; raise `StageError` when torch cannot trace it."""
    inputs = task.example_inputs(2)
    batch = torch.export.Dim.AUTO
    shapes = tuple({0: batch} if isinstance(x, torch.Tensor) and x.dim() else None for x in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs, dynamic_shapes=shapes if dynamic_batch else None)
    except Exception as error:  # tracing runs the model's code and raises many kinds of errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StageError(
            f"torch.export cannot trace {type(model).__name__}: {reason}. Leave this format out, or rewrite what the "
            "message names; `dynamic_batch: false` may help"
        ) from error


class TorchExporter(Exporter[TorchExportFormat]):
    """A program of ATen operators."""

    suffix = ".pt2"

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Trace and save."""
        program = exported(model, task, self.config.dynamic_batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, path)

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Load the program."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path).module()
