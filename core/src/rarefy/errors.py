"""Errors a user can meet. Each message says what was given, what is allowed and what to do next."""

from __future__ import annotations

from collections.abc import Iterable


class RarefyError(Exception):
    """Parent of all errors that rarefy raises on purpose."""

    exit_code = 1


class RecipeError(RarefyError):
    """The recipe, a reference or an option is wrong."""

    exit_code = 2


class PluginError(RarefyError):
    """A plugin is missing, broken or in conflict with another."""

    exit_code = 4


class StageError(RarefyError):
    """A stage of the run failed; the run can be resumed once the cause is mended."""


class ArtifactError(RarefyError):
    """A file is not a sound artifact."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return a sentence that suggests the nearest of `allowed` and lists them all."""
    from difflib import get_close_matches

    names = sorted(allowed)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return f"{guess}Allowed: {', '.join(names) or 'none'}."
