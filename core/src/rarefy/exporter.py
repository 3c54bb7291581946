"""What an export format is: a writer and a way to open the file again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from rarefy_schemas import ExporterConfig, Measurement
from torch import nn

from rarefy.modules import Base
from rarefy.task import Task

ConfigT = TypeVar("ConfigT", bound=ExporterConfig)


class Exporter(Generic[ConfigT]):
    """A target format; core re-opens the file and compares outputs before it counts as exported."""

    suffix = ""
    """File ending, with its dot."""
    tolerance = 1e-4
    """Largest accepted difference of outputs, relative to the largest output; infinite where `measure` judges."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.notes: list[str] = []
        """Findings in words for the report, such as layers left alone; both `write` and `measure` may add some."""

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Write `model`, in evaluation mode on the CPU, to `path`."""
        raise NotImplementedError

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Return a callable from the model's positional inputs to its outputs, backed by the file alone."""
        raise NotImplementedError

    def measure(self, model: nn.Module, reopened: Callable[..., Any], task: Task) -> list[Measurement]:
        """Return figures of the re-opened file beside `model`, for formats that lose something.

        Raises `StageError` when the file is not worth keeping.
        """
        return []
