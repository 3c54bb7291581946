"""The scheme `zoo:`."""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.calling import call
from rarefy.source import Source
from rarefy.zoo import NAMES, ZOO


class ZooSource(Source):
    """The networks of `rarefy.zoo`."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the networks."""
        return NAMES

    def model(self, name: str, **options: Any) -> nn.Module:
        """Build a network; raise `RecipeError` for options it does not have."""
        return call(ZOO[name], options, f"zoo:{name}", nn.Module)
