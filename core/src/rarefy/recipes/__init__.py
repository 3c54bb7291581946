"""Recipes that ship with rarefy."""

from __future__ import annotations

from pathlib import Path

from rarefy.errors import RecipeError, did_you_mean

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(file.stem for file in _HERE.glob("*.yaml"))


def path(name: str) -> Path:
    """Return the file of a shipped recipe."""
    if name not in names():
        raise RecipeError(f"there is no shipped recipe {name!r}. {did_you_mean(name, names())}")
    return _HERE / f"{name}.yaml"
