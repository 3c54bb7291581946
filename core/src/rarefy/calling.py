"""Calling builders that a reference names, with errors that say what was wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rarefy.errors import RarefyError, RecipeError, did_you_mean

T = TypeVar("T")


def call(builder: Callable[..., Any], options: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return `builder(**options)`.

    Raises `RecipeError` for options it does not have, when it fails, or when the result is no `kind`.
    """
    allowed = _options(builder)
    unknown = [option for option in options if allowed is not None and option not in allowed]
    if unknown:
        raise RecipeError(f"{name} has no option {unknown[0]!r}. {did_you_mean(unknown[0], allowed or ())}")
    try:
        made = builder(**options)
    except RarefyError:
        raise
    except Exception as error:  # the builder is the user's code and may raise anything
        raise RecipeError(f"{name} failed with {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise RecipeError(f"{name} returned {type(made).__name__}, not a {kind.__name__}")
    return made


def _options(builder: Callable[..., Any]) -> list[str] | None:
    """Return the names a builder takes as keywords, None when it takes any or does not say."""
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
