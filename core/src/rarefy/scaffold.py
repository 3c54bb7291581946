"""Write the package of a new plugin."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from rarefy import __version__
from rarefy.errors import RecipeError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_TAKEN = ("config", "schemas", "workspace", "pruning", "quantization", "factorization", "filters", "distillation")
_ENDING = ".tmpl"


def new_plugin(family: str, name: str, directory: Path) -> Path:
    """Write an installable package for the technique `family/name` into a new folder of `directory` and return it.

    The method it starts with is a small real one of the family; a family of its own starts with rounding.
    Raises `RecipeError` for a name that is no lower-case kebab identifier or is taken, and when the folder exists.
    """
    _refuse_bad_name("family", family)
    _refuse_bad_name("name", name)
    if name in _TAKEN or keyword.iskeyword(_camel(name)):
        raise RecipeError(
            f"the name {name!r} would clash with another package or module; choose another, such as 'my-{name}'"
        )
    folder = directory / f"rarefy-{name}"
    files = _files(family, name)
    try:
        folder.mkdir(parents=True)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise RecipeError(
            f"{error.filename} exists already; choose another name or --directory, or remove it"
        ) from error
    except OSError as error:
        raise RecipeError(
            f"cannot write {error.filename or folder}: {error.strerror}; choose another --directory"
        ) from error
    return folder


def families() -> tuple[str, ...]:
    """Return the families that have a starting method of their own."""
    return tuple(sorted(entry.name for entry in _templates().joinpath("families").iterdir()))


def _refuse_bad_name(what: str, text: str) -> None:
    if not _NAME.fullmatch(text):
        words = re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", text).lower()
        suggestion = "-".join(re.findall(r"[a-z0-9]+", words)).lstrip("0123456789-") or "my-method"
        raise RecipeError(
            f"the {what} {text!r} must be lower-case words joined by hyphens and start with a letter, "
            f"such as {suggestion!r}"
        )


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))


def _templates() -> Traversable:
    return resources.files("rarefy").joinpath("templates")


def _files(family: str, name: str) -> dict[str, str]:
    """Return the text of each file of the package by path; the family's templates replace the common ones."""
    module, kind = name.replace("-", "_"), family if family in families() else "quantization"
    values = {
        "family": family,
        "name": name,
        "module": module,
        "package": f"rarefy_{module}",
        "cls": _camel(name),
        "version": __version__,
    }
    found = {**_read(_templates() / "plugin"), **_read(_templates() / "families" / kind)}
    return {_named(path, values): Template(text).substitute(values) for path, text in found.items()}


def _named(path: str, values: dict[str, str]) -> str:
    return path.replace("__package__", values["package"]).replace("__module__", values["module"])


def _read(folder: Traversable, parent: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _read(entry, f"{parent}{entry.name}/")
        elif entry.name.endswith(_ENDING):
            found[parent + entry.name.removesuffix(_ENDING)] = entry.read_text(encoding="utf-8")
    return found
