"""Recipes that ship with rarefy."""

from __future__ import annotations

from pathlib import Path

from rarefy.errors import RecipeError, did_you_mean

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(file.stem for file in _HERE.glob("*.yaml"))


def find(source: str | Path) -> Path:
    """Return the file at `source`, or where there is none, the shipped recipe of that name."""
    if Path(source).exists():
        return Path(source)
    if str(source) not in names():
        raise RecipeError(
            f"cannot read the recipe {source}: there is no such file, nor a shipped recipe of that name. "
            f"{did_you_mean(str(source), names())}"
        )
    return _HERE / f"{source}.yaml"


def title(name: str) -> str:
    """Return the first line of a shipped recipe, which says what it does."""
    return find(name).read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
