"""Where references such as `zoo:lenet5` lead."""

from __future__ import annotations

from typing import Any

from rarefy_schemas import SourceConfig
from torch import nn

from rarefy.errors import RecipeError
from rarefy.task import Task


class Source:
    """A scheme of references; a subclass offers models, tasks, or both."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    def names(self) -> tuple[str, ...]:
        """Return the names this scheme knows, for messages; empty when they cannot be listed."""
        return ()

    def model(self, name: str, **options: Any) -> nn.Module:
        """Build the model called `name`, without trained weights unless the source brings them."""
        raise RecipeError(f"the source {self.config.registered_name()!r} has no models, only tasks")

    def task(self, name: str, **options: Any) -> Task:
        """Build the task called `name`."""
        raise RecipeError(f"the source {self.config.registered_name()!r} has no tasks, only models")
