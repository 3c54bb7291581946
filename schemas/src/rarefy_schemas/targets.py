"""Which layers a step acts on."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pydantic import Field

from rarefy_schemas.base import Schema


class Targets(Schema):
    """Layers by name pattern and by type; a layer is a target when it matches `include` and not `exclude`."""

    include: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Shell patterns over module names (`features.*`)."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over module names to leave alone."""
    types: tuple[str, ...] = ()
    """Class names of layers (`Linear`, `Conv2d`); empty means every type the technique handles."""

    def matches(self, name: str, kind: str) -> bool:
        """Tell whether a layer called `name` of class `kind` is meant."""
        return (
            any(fnmatchcase(name, pattern) for pattern in self.include)
            and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
            and (not self.types or kind in self.types)
        )
