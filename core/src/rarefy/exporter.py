"""What an export format is: a writer and a way to open the file again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from rarefy_schemas import ExporterConfig
from torch import nn

from rarefy.modules import Base
from rarefy.task import Task

ConfigT = TypeVar("ConfigT", bound=ExporterConfig)


class Exporter(Generic[ConfigT]):
    """A target format; core re-opens the file and compares outputs before it counts as exported."""

    suffix = ""
    """File ending, with its dot."""
    tolerance = 1e-4
    """Largest accepted difference of outputs, relative to the largest output."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Write `model`, in evaluation mode on the CPU, to `path`."""
        raise NotImplementedError

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Return a callable from the model's positional inputs to its outputs, backed by the file alone."""
        raise NotImplementedError
