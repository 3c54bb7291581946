"""The classes a file may construct: those of torch.nn, and those that installed plugins registered."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, overload

import torch
from rarefy_schemas import ModuleSpec
from torch import nn

from rarefy.errors import ArtifactError
from rarefy.modules.plain import from_json, is_plain, same, to_json
from rarefy.registry import Plugin, discover, get

ToSpec = Callable[[Any], dict[str, Any]]
FromSpec = Callable[[dict[str, Any]], nn.Module]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class UnregisteredError(ArtifactError):
    """A module's class cannot be written as plain data."""


@dataclass(frozen=True)
class Kind:
    """A registered class with its two conversions."""

    name: str
    cls: type[nn.Module]
    to_spec: ToSpec
    from_spec: FromSpec
    container: bool = False


_BY_CLASS: dict[type[nn.Module], Kind] = {}
_BY_NAME: dict[str, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Add a class to those that a file may construct."""
    _BY_CLASS[kind.cls] = kind
    _BY_NAME[kind.name] = kind


@overload
def register_module(
    cls: type[ModuleT], to_spec: ToSpec | None = ..., from_spec: FromSpec | None = ...
) -> type[ModuleT]: ...
@overload
def register_module(
    cls: None = None, to_spec: ToSpec | None = ..., from_spec: FromSpec | None = ...
) -> Callable[[type[ModuleT]], type[ModuleT]]: ...
def register_module(cls: Any = None, to_spec: ToSpec | None = None, from_spec: FromSpec | None = None) -> Any:
    """Register a module class, as a decorator or by a call, so that models with it can be saved and loaded.

    `to_spec(module)` returns the constructor's arguments as plain data; by default each is read from the attribute
    of its name, and an argument named like a parameter (`bias`) says whether the module has that parameter.
    `from_spec(arguments)` constructs the module, by default `cls(**arguments)`; tensors are filled in afterwards.
    The class must stand at the top level of a module of its plugin, since its name is all that a file holds.
    """
    if cls is None:
        return lambda found: register_module(found, to_spec, from_spec)
    register_kind(
        Kind(f"{cls.__module__}.{cls.__qualname__}", cls, to_spec or recover, from_spec or (lambda given: cls(**given)))
    )
    return cls


def kind_of(module: nn.Module) -> Kind | None:
    """Return the registration of the module's very class, or None."""
    return _BY_CLASS.get(type(module))


def recover(module: nn.Module) -> dict[str, Any]:
    """Return the constructor's arguments, read from the attributes of their names."""
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in ("device", "dtype") or name.startswith("_"):
            continue
        value = module._parameters[name] is not None if name in module._parameters else getattr(module, name, _missing)
        if value is _missing and parameter.default is not parameter.empty:
            continue
        if not is_plain(value):
            raise UnregisteredError(
                f"the argument {name!r} of {type(module).__name__} cannot be read from the attribute of that name; "
                "register the class with rarefy.modules.register_module(cls, to_spec=...)"
            )
        # a default left out keeps files open to versions of torch that do not know the argument yet
        if not (is_plain(parameter.default) and same(value, parameter.default)):
            arguments[name] = value
    return arguments


def specify(module: nn.Module) -> ModuleSpec:
    """Return the spec of a module of a registered class; raise `UnregisteredError` for others."""
    kind = kind_of(module)
    if kind is None:
        raise UnregisteredError(_how_to_register(module))
    if kind.container:
        children = {name: specify(child) for name, child in module._modules.items() if child is not None}
        return ModuleSpec(kind=kind.name, children=children)
    arguments = {name: to_json(value) for name, value in kind.to_spec(module).items()}
    return ModuleSpec(kind=kind.name, arguments=arguments, distribution=_distribution(kind.name))


def construct(spec: ModuleSpec) -> nn.Module:
    """Construct a module on the meta device; raise `ArtifactError` for a class that is not registered."""
    kind = _BY_NAME.get(spec.kind) or _of_plugin(spec)
    children = {name: construct(child) for name, child in spec.children.items()}
    arguments = {name: from_json(value) for name, value in spec.arguments.items()}
    # these would move the construction off the meta device, or hand tensors in
    refused = sorted(name for name in arguments if name in ("device", "dtype") or name.startswith("_"))
    if refused or (children and not kind.container):
        raise ArtifactError(f"{spec.kind} cannot be constructed with {', '.join(refused) or 'children'}")
    if kind.container:
        arguments["children"] = children
    try:
        with torch.device("meta"):
            module = kind.from_spec(arguments)
    except Exception as error:  # the arguments come from a file, so the constructor may raise anything
        raise ArtifactError(f"{spec.kind} cannot be constructed with {spec.arguments}: {error}") from error
    return module


def _missing() -> None:
    """Stand for an attribute that is not there."""


def _how_to_register(module: nn.Module) -> str:
    cls = type(module)
    if hasattr(module, "parametrizations"):
        return (
            f"{cls.__name__} still has parametrizations, which are training scaffolding; remove them in `consolidate` "
            "with torch.nn.utils.parametrize.remove_parametrizations"
        )
    return (
        f"the class {cls.__module__}.{cls.__qualname__} is not registered, so a file cannot say how to construct it; "
        "write @rarefy.modules.register_module above the class, or build the module from torch.nn classes"
    )


@cache
def _distribution(name: str) -> str | None:
    """Return `name==version` of the plugin that provides a class, None for torch and for the user's own code."""
    if name.startswith("torch."):
        return None
    package = name.partition(".")[0]
    plugins = discover()
    for plugin in plugins:
        if _package(plugin) == package:
            siblings = {_package(other) for other in plugins if other.distribution == plugin.distribution}
            # a checkout's workspace provides several; what one installs is the package itself
            provider = plugin.distribution if len(siblings) == 1 else package.replace("_", "-")
            return f"{provider}=={plugin.version}"
    return None


def _package(plugin: Plugin) -> str:
    return plugin.module.partition(":")[0].partition(".")[0]


def _of_plugin(spec: ModuleSpec) -> Kind:
    """Import the plugin's module that defines a class, and nothing that is not an installed plugin's."""
    loaded = [plugin for plugin in get().plugins if plugin.state == "loaded"]
    packages = {_package(plugin) for plugin in loaded}
    # no leading underscore: `package.__main__` runs a program when it is imported
    well_formed = re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", spec.kind)
    if spec.kind not in _BY_NAME and well_formed and spec.kind.partition(".")[0] in packages:
        try:
            importlib.import_module(spec.kind.rpartition(".")[0])
        except ImportError as error:
            raise ArtifactError(f"the class {spec.kind} cannot be imported: {error}; {_advice(spec)}") from error
    if spec.kind not in _BY_NAME:
        raise ArtifactError(f"the file needs the class {spec.kind[:200]!r}, which is not registered; {_advice(spec)}")
    return _BY_NAME[spec.kind]


def _advice(spec: ModuleSpec) -> str:
    name, _, version = (spec.distribution or "").partition("==")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and re.fullmatch(r"[A-Za-z0-9.+!]{1,40}", version):
        return f"`pip install {name}` provides it (the file was written with version {version})"
    return "import the code that registers it before loading, or ask whoever wrote the file"
