"""The scheme `data:`."""

from __future__ import annotations

from typing import Any

from rarefy.calling import call
from rarefy.source import Source
from rarefy.task import Task
from rarefy.tasks.data import DATA


class DataSource(Source):
    """The data sets of `rarefy.tasks.data`."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the data sets."""
        return tuple(DATA)

    def task(self, name: str, **options: Any) -> Task:
        """Read a data set; raise `RecipeError` when it is not there or damaged."""
        return call(DATA[name], options, f"data:{name}", Task)  # type: ignore[type-abstract]
