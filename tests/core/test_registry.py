"""Plugins are loaded one at a time; a broken one is named and never takes the rest down."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from rarefy import registry
from rarefy.errors import PluginError
from rarefy.registry import Registry, discover

GOOD = """
from typing import ClassVar, Literal
from rarefy.hookspecs import hookimpl
from rarefy_schemas import TechniqueConfig

class Config(TechniqueConfig):
    '''Does {name}.'''
    implementation: ClassVar[str] = f"{{__name__}}:Nothing"
    technique: Literal["{name}"] = "{name}"

@hookimpl
def register_techniques():
    return [Config]
"""

CORE = {"prepare/linear", "recovery/batch-norm"}
"""Techniques that are there without any plugin."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes `source` look like a plugin of an installed distribution."""
    points: list[EntryPoint] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_points", lambda: points)

    def add(name: str, source: str, distribution: str = "", module: str = "") -> None:
        module = module or f"made_{name}_{len(points)}"
        (tmp_path / f"{module}.py").write_text(source)
        point = EntryPoint(name, module, registry.GROUP)
        owner = SimpleNamespace(name=distribution or f"dist-{name}", version="1.0")
        vars(point)["dist"] = owner
        points.append(point)

    yield add
    for name in [name for name in sys.modules if name.startswith(("made_", "rarefy_plugin_"))]:
        del sys.modules[name]


def test_a_plugin_is_found_by_its_entry_point(install) -> None:
    install("good", GOOD.format(name="x/one"))
    loaded = Registry(discover())
    assert set(loaded.techniques) == {"x/one", *CORE}
    assert loaded.owner("x/one") == "dist-good 1.0"
    assert [plugin.state for plugin in loaded.plugins] == ["loaded"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import not_there_at_all", "ModuleNotFoundError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        (
            "from rarefy.hookspecs import hookimpl\n@hookimpl\ndef register_techniqes(): return []",
            "register_techniqes",
        ),
        (
            "from rarefy.hookspecs import hookimpl\n@hookimpl\ndef analyze(technique, modle, task): return None",
            "modle",
        ),
    ],
)
def test_a_broken_plugin_is_a_named_warning_and_the_rest_works(
    install, source: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    install("bad", source)
    install("good", GOOD.format(name="x/one"))
    loaded = Registry(discover())
    assert set(loaded.techniques) == {"x/one", *CORE}
    assert [(plugin.name, plugin.state) for plugin in loaded.plugins] == [("bad", "failed"), ("good", "loaded")]
    assert reason in loaded.failed[0].error
    assert "plugin 'bad' of dist-bad 1.0 failed to load" in caplog.text
    assert len(caplog.records) == 1


def test_two_plugins_of_one_name_are_an_error_naming_both_distributions(install) -> None:
    install("same", GOOD.format(name="x/one"), "dist-a")
    install("same", GOOD.format(name="x/two"), "dist-b")
    with pytest.raises(PluginError, match=r"'same': dist-a 1\.0 and dist-b 1\.0; uninstall"):
        Registry(discover())


def test_two_providers_of_one_technique_are_an_error_naming_both(install) -> None:
    install("a", GOOD.format(name="x/one"))
    install("b", GOOD.format(name="x/one"))
    with pytest.raises(PluginError, match=r"'x/one' is registered by dist-a 1\.0 and by dist-b 1\.0"):
        _ = Registry(discover()).techniques


@pytest.mark.parametrize(
    ("variable", "value", "states"),
    [
        ("RAREFY_PLUGINS", "a", {"a": "loaded", "b": "blocked"}),
        ("RAREFY_PLUGINS", "", {"a": "blocked", "b": "blocked"}),
        ("RAREFY_DISABLED_PLUGINS", "a, c", {"a": "blocked", "b": "loaded"}),
    ],
)
def test_allow_and_block_lists_act_before_the_import(
    install, variable: str, value: str, states: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, state in states.items():
        source = GOOD.format(name=f"x/{name}")
        install(name, source if state == "loaded" else "raise SystemExit('imported although blocked')")
    monkeypatch.setenv(variable, value)
    assert {plugin.name: plugin.state for plugin in Registry(discover()).plugins} == states


def test_a_noun_without_its_name_is_refused(install) -> None:
    install("a", GOOD.format(name="x/one").replace('technique: Literal["x/one"] = "x/one"', "other: int = 1"))
    with pytest.raises(PluginError, match=r"register_techniques of dist-a 1\.0: Config needs a field"):
        _ = Registry(discover()).techniques


def test_what_is_no_config_is_refused(install) -> None:
    install("a", GOOD.format(name="x/one").replace("[Config]", "['x/one']"))
    with pytest.raises(PluginError, match="return subclasses of TechniqueConfig"):
        _ = Registry(discover()).techniques


def test_a_single_file_is_a_plugin_without_packaging(install, tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(GOOD.format(name="mine/method"))
    assert set(Registry([], [file]).techniques) == {"mine/method", *CORE}
    with pytest.raises(PluginError, match="there is no file"):
        Registry([], [tmp_path / "missing.py"])
    file.write_text("1/0")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        Registry([], [file])
