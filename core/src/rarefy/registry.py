"""Find plugins, load them one at a time, and know what they registered. Imports no torch and no pydantic by itself."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from rarefy import hookspecs
from rarefy.errors import PluginError

if TYPE_CHECKING:
    from rarefy_schemas import ExporterConfig, Noun, ObjectiveConfig, SourceConfig, TechniqueConfig

GROUP = "rarefy"
ALLOW = "RAREFY_PLUGINS"
BLOCK = "RAREFY_DISABLED_PLUGINS"
FILES = "RAREFY_PLUGIN_FILES"
State = Literal["installed", "blocked", "loaded", "failed"]

log = logging.getLogger("rarefy")
NounT = TypeVar("NounT", bound="type[Noun]")


@dataclass(frozen=True)
class Plugin:
    """One plugin and how it fared."""

    name: str
    distribution: str
    version: str
    module: str
    state: State
    error: str = ""


def _listed(variable: str) -> set[str] | None:
    text = os.environ.get(variable)
    return None if text is None else {name.strip() for name in text.split(",") if name.strip()}


def _points() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.dist.name if point.dist else ""))


def discover() -> list[Plugin]:
    """List the installed plugins from their metadata, importing none of them."""
    allowed, blocked = _listed(ALLOW), _listed(BLOCK) or set()
    plugins: list[Plugin] = []
    for point in _points():
        usable = (allowed is None or point.name in allowed) and point.name not in blocked
        plugin = Plugin(
            name=point.name,
            distribution=point.dist.name if point.dist else "unknown",
            version=point.dist.version if point.dist else "unknown",
            module=point.value,
            state="installed" if usable else "blocked",
        )
        if plugin not in plugins:  # an editable and a built copy of one distribution report the same entry twice
            plugins.append(plugin)
    return plugins


class Registry:
    """The loaded plugins with their hooks and nouns."""

    def __init__(self, plugins: Iterable[Plugin], files: Iterable[Path] = ()) -> None:
        self.manager = pluggy.PluginManager("rarefy")
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        self._origins: dict[str, str] = {}
        self._owners: dict[tuple[str, str], str] = {}
        for module in ("rarefy.builtin", "rarefy.stages"):
            self._register(module, importlib.import_module(module))
        plugins = list(plugins)
        _refuse_twins(plugins)
        for plugin in plugins:
            self._load(plugin, partial(importlib.import_module, plugin.module))
        for file in files:
            stem = f"rarefy_plugin_{file.stem}"
            plugin = Plugin(file.stem, str(file), "", stem, "installed")
            self._load(plugin, partial(_import_file, file, stem), fatal=True)

    @property
    def hook(self) -> Any:
        """Return the hook callers, one attribute per hook specification."""
        return self.manager.hook

    def _register(self, name: str, module: ModuleType) -> None:
        try:
            self.manager.register(module, name)
            self.manager.check_pending()
        except pluggy.PluginValidationError:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            raise

    def _load(self, plugin: Plugin, importer: Callable[[], ModuleType], fatal: bool = False) -> None:
        if plugin.state == "blocked":
            self.plugins.append(plugin)
            return
        self._origins[plugin.name] = f"{plugin.distribution} {plugin.version}".strip()
        try:
            self._register(plugin.name, importer())
        except (Exception, SystemExit) as error:  # a plugin may raise anything; a broken one never breaks the rest
            reason = f"{type(error).__name__}: {error}"
            if fatal:
                raise PluginError(f"the plugin file {plugin.distribution} does not load: {reason}") from error
            log.warning(
                "plugin %r of %s failed to load and is ignored: %s", plugin.name, self._origins[plugin.name], reason
            )
            self.plugins.append(replace(plugin, state="failed", error=reason))
        else:
            self.plugins.append(replace(plugin, state="loaded"))

    def _nouns(self, hook_name: str, kind: type[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for name, module in self.manager.list_name_plugin():
            hook = getattr(self.manager.hook, hook_name)
            for implementation in (impl for impl in hook.get_hookimpls() if impl.plugin is module):
                origin = self._origins.get(name, "rarefy")
                for noun in _checked(implementation.function(), kind, hook_name, origin):
                    key = noun.registered_name()
                    if key in found and found[key] is not noun:
                        raise PluginError(
                            f"{key!r} is registered by {owners[key]} and by {origin}; uninstall one of them, or block "
                            f"its plugin with {BLOCK}=NAME (`rarefy plugins list` shows the names)"
                        )
                    found[key], owners[key] = noun, origin
        self._owners.update({(hook_name, key): owner for key, owner in owners.items()})
        return dict(sorted(found.items()))

    @cached_property
    def techniques(self) -> dict[str, type[TechniqueConfig]]:
        """Configs of the installed techniques by name."""
        from rarefy_schemas import TechniqueConfig

        return self._nouns("register_techniques", TechniqueConfig)

    @cached_property
    def objectives(self) -> dict[str, type[ObjectiveConfig]]:
        """Configs of the installed objectives by name."""
        from rarefy_schemas import ObjectiveConfig

        return self._nouns("register_objectives", ObjectiveConfig)

    @cached_property
    def exporters(self) -> dict[str, type[ExporterConfig]]:
        """Configs of the installed exporters by name."""
        from rarefy_schemas import ExporterConfig

        return self._nouns("register_exporters", ExporterConfig)

    @cached_property
    def sources(self) -> dict[str, type[SourceConfig]]:
        """Configs of the installed sources by scheme."""
        from rarefy_schemas import SourceConfig

        return self._nouns("register_sources", SourceConfig)

    def owner(self, technique: str) -> str:
        """Return the distribution and version that registered a technique."""
        _ = self.techniques
        return self._owners.get(("register_techniques", technique), "unknown")

    @property
    def failed(self) -> list[Plugin]:
        """Plugins that did not load."""
        return [plugin for plugin in self.plugins if plugin.state == "failed"]


def _refuse_twins(plugins: list[Plugin]) -> None:
    seen: dict[str, Plugin] = {}
    for plugin in plugins:
        other = seen.setdefault(plugin.name, plugin)
        if other is not plugin and plugin.state != "blocked":
            raise PluginError(
                f"two installed distributions provide the plugin {plugin.name!r}: {other.distribution} "
                f"{other.version} and {plugin.distribution} {plugin.version}; uninstall one of them"
            )


def _checked(nouns: Iterable[Any], kind: type[Any], hook_name: str, origin: str) -> Iterator[Any]:
    for noun in nouns:
        if not (isinstance(noun, type) and issubclass(noun, kind)):
            raise PluginError(f"{hook_name} of {origin} returned {noun!r}; return subclasses of {kind.__name__}")
        try:
            _name_of(noun)
        except TypeError as error:
            raise PluginError(f"{hook_name} of {origin}: {error}") from error
        yield noun


def _name_of(noun: Any) -> str:
    name: str = noun.registered_name()
    return name


def _import_file(file: Path, name: str) -> ModuleType:
    if not file.is_file():
        raise PluginError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@cache
def get() -> Registry:
    """Return the process's registry, loading the plugins at the first call.

    Single files named in the environment variable `RAREFY_PLUGIN_FILES` (separated like `PATH`) are loaded too.
    """
    files = [Path(text) for text in os.environ.get(FILES, "").split(os.pathsep) if text]
    return Registry(discover(), files)


def add_files(files: Iterable[str]) -> None:
    """Have `get` load single-file plugins too, in this process and in those it starts."""
    known = [text for text in os.environ.get(FILES, "").split(os.pathsep) if text]
    os.environ[FILES] = os.pathsep.join([*known, *(str(Path(file).absolute()) for file in files)])
    get.cache_clear()
