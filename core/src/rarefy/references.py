"""From references such as `zoo:lenet5`, `package.module:build` or `./file.py:build` to models and tasks."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rarefy_schemas import ModelReference, TaskReference
from torch import nn

from rarefy import weightfiles
from rarefy.calling import call
from rarefy.errors import RarefyError, RecipeError, did_you_mean
from rarefy.nouns import implement
from rarefy.registry import get
from rarefy.seeds import seeded
from rarefy.source import Source
from rarefy.task import Task

T = TypeVar("T")


def build_model(
    reference: ModelReference, *, trusted: bool = True, load_weights: bool = False, seed: int = 0
) -> nn.Module:
    """Build the model that a reference names, its random weights from `seed`, and read its weights when asked to.

    `trusted=False` refuses references that run the user's own code. Raises `RecipeError`.
    """
    with seeded(seed):
        model = _build(reference.source, reference.options, "model", nn.Module, trusted)
    if load_weights and reference.weights is not None:
        weightfiles.load_weights(model, Path(reference.weights).expanduser())
    return model


def build_task(reference: TaskReference) -> Task:
    """Build the task that a reference names; raise `RecipeError` when that is not possible."""
    return _build(reference.source, reference.options, "task", Task, True)  # type: ignore[type-abstract]


def _build(source: str, options: dict[str, Any], kind: str, type_: type[T], trusted: bool) -> T:
    scheme, colon, name = source.partition(":")
    sources = get().sources
    if colon and scheme in sources:
        found: Source = implement(sources[scheme]())
        known = found.names()
        if known and name not in known:
            raise RecipeError(f"{scheme!r} has no {kind} {name!r}. {did_you_mean(name, known)}")
        return call(partial(getattr(found, kind), name), options, source, type_)
    if not trusted:
        raise RecipeError(
            f"{source!r} is somebody's own code, which is not run here; import it yourself and hand over what it builds"
        )
    return call(_callable(source, sources), options, source, type_)


def _callable(source: str, sources: Iterable[str]) -> Callable[..., Any]:
    place, colon, name = source.rpartition(":")
    if not colon or not place:
        raise RecipeError(
            f"{source!r} is no reference; write SCHEME:NAME with a scheme of {', '.join(sources)}, "
            "package.module:callable, or ./file.py:callable"
        )
    module = _file(Path(place)) if place.endswith(".py") else _module(place, source, sources)
    found = getattr(module, name, None)
    if isinstance(found, nn.Module):
        raise RecipeError(
            f"{source!r} is a network; name a function that returns it, since each call must be a new one"
        )
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        public = [n for n in own if not n.startswith("_")]
        raise RecipeError(f"{place} has no callable {name!r}. {did_you_mean(name, public)}")
    return found  # type: ignore[no-any-return]


def _module(place: str, source: str, sources: Iterable[str]) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise RecipeError(f"{source!r}: {place!r} is no module; for a file write its ending too, ./file.py:callable")
    try:
        return importlib.import_module(place)
    except Exception as error:  # importing runs the user's code
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{place}.".startswith(f"{missing}."):
            raise RecipeError(
                f"{source!r}: there is neither a source nor a module {place!r}. {did_you_mean(place, sources)} For a "
                "file in the current folder write ./file.py:callable"
            ) from error
        raise RecipeError(f"{source!r}: importing {place} failed with {type(error).__name__}: {error}") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"there is no file {path} in the current folder; references to files are relative to it")
    # once per process: a second import would make classes that differ from those of the first
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"rarefy_reference_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # as when Python runs a script, files beside it can be imported
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    except RarefyError:
        del sys.modules[name]
        raise
    except Exception as error:  # the file is the user's code
        del sys.modules[name]
        raise RecipeError(f"running {path} failed with {type(error).__name__}: {error}") from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have taken it away itself
            sys.path.remove(beside)
    return module
