"""YAML as people mean it: duplicate keys are errors, `1e-3` is a number, `no` is a word, every value has a place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rarefy.errors import RecipeError

_SCALARS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.nan$"
        ),
        "-+.0123456789",
    ),
}


class _Scalars:
    """YAML 1.2's core scalars instead of 1.1's, for reading and for writing."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float", ":timestamp", ":int"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _SCALARS.items():
    for _character in _first:
        _Scalars.yaml_implicit_resolvers.setdefault(_character, []).append((f"tag:yaml.org,2002:{_name}", _pattern))


class _Loader(_Scalars, yaml.SafeLoader):
    """Reads."""

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """Return a whole number; leading zeros do not make it octal."""
        return int(node.value.replace("_", ""))


class _Dumper(_Scalars, yaml.SafeDumper):
    """Writes."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


@dataclass(frozen=True)
class Document:
    """A parsed file with the places of its values."""

    data: Any
    source: str
    root: yaml.Node | None = None

    def place(self, location: tuple[int | str, ...]) -> str:
        """Return `file:line:column` of the value at `location`, or of the nearest value around it."""
        node = self.root
        if node is None:
            return self.source
        for part in location:
            found = _child(node, part)
            node = found if found is not None else node
        return f"{self.source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _child(node: yaml.Node, part: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                # a wrong key is shown at the key, a wrong value at the value
                return value if isinstance(value, (yaml.MappingNode, yaml.SequenceNode)) else _at_key(key, value)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part]  # type: ignore[no-any-return]
    return None


def _at_key(key: yaml.Node, value: yaml.Node) -> yaml.Node:
    return yaml.ScalarNode(value.tag, value.value, start_mark=key.start_mark, end_mark=value.end_mark)


def parse(text: str, source: str) -> Document:
    """Parse YAML or JSON text; raise `RecipeError` with the place of a syntax error or a duplicate key."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise RecipeError(f"{source} is empty")
        _refuse_duplicates(root, source)
        return Document(loader.construct_document(root), source, root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def read(path: Path) -> Document:
    """Parse the file at `path`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    return parse(text, str(path))


def _refuse_duplicates(node: yaml.Node, source: str, seen: set[int] | None = None) -> None:
    seen = set() if seen is None else seen
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, Any] = {}
        for key, value in node.value:
            mark = key.start_mark
            if key.value in first:
                raise RecipeError(
                    f"{source}:{mark.line + 1}:{mark.column + 1}: the key {key.value!r} is given twice, "
                    f"first in line {first[key.value].line + 1}; keep one"
                )
            first[key.value] = mark
            _refuse_duplicates(value, source, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, source, seen)


def dump(data: Any) -> str:
    """Return `data`, plain values only, as YAML in its own order."""
    # written in ASCII: PyYAML's plain output of some line separators does not read back
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)
