"""Install wheels as a stranger would, in an environment that has never seen this checkout.

torch and its like are not downloaded again: each environment links the installed files of exactly those third-party
distributions that the wheels require, directly or through one another. Nothing of this checkout is linked, whose
editable installation would lend its entry points, and a requirement that a wheel forgets to declare is missing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
MEMBERS = ["schemas", "core", *sorted(f"plugins/{path.parent.name}" for path in ROOT.glob("plugins/*/pyproject.toml"))]
EXAMPLE = "contrib/example"

CODE = """
import torch
from torch import nn
from rarefy.tasks import ClassificationTask

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

def task():
    images = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ClassificationTask.from_arrays(images, images.flatten(1)[:, :3].argmax(1), batch_size=20)
"""
RECIPE = """
model: ./code.py:build
task: ./code.py:task
evaluate: {batch_sizes: [1], rounds: 3}
steps:
  - technique: pruning/bank-balanced
    amount: 0.75
    finetune: {epochs: 1}
"""


class Environment:
    """A virtual environment with some wheels of ours and what they require."""

    def __init__(self, folder: Path, wheels: Path, names: list[str], extra: Iterable[str] = ()) -> None:
        self.folder = folder
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        site = next(folder.glob("lib/python*/site-packages"))
        _link(site, wheels, [*names, *extra])
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", "--find-links", wheels]
        subprocess.run([*pip, "--quiet", "--disable-pip-version-check", *names], check=True)

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, blind to ours."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAREFY", "PYTHON", "COV_", "PYTEST"))}
        program = [self.folder / "bin" / command[0], *command[1:]]
        return subprocess.run(program, cwd=cwd or self.folder, env=clean, capture_output=True, text=True, check=False)

    def json(self, *command: str | Path, cwd: Path | None = None) -> Any:
        """Return what a command prints as JSON."""
        done = self.run(*command, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def _link(site: Path, wheels: Path, names: Iterable[str]) -> None:
    """Link what `names` require, ours being read from the wheels and not linked."""
    waiting, seen = [Requirement(name) for name in names], set()
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        if name.startswith("rarefy"):
            needs = _requirements(next(wheels.glob(f"{name.replace('-', '_')}-*.whl")))
        else:
            found = distribution(name)
            needs = found.requires or []
            for part in _top_level(found) - {path.name for path in site.iterdir()}:
                (site / part).symlink_to(Path(str(found.locate_file(part))))
        waiting += [Requirement(text) for text in needs]


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


def _top_level(found: Distribution) -> set[str]:
    parts = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
    return {part for part in parts if Path(str(found.locate_file(part))).exists()}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of every member and of the example."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-w", folder, *(f"./{member}" for member in [*MEMBERS, EXAMPLE])], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def stranger(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install the example, which brings core and schemas."""
    return Environment(tmp_path_factory.mktemp("stranger"), wheels, ["rarefy-bank-balanced"], ["pytest"])


def test_each_member_is_a_wheel_of_its_own(wheels: Path) -> None:
    for member in [*MEMBERS, EXAMPLE]:
        package = next((ROOT / member / "src").iterdir())
        found = next(wheels.glob(f"{'rarefy' if member == 'core' else package.name}-*.whl"))
        with zipfile.ZipFile(found) as archive:
            inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        files = {p.relative_to(package.parent).as_posix() for p in package.rglob("*") if p.is_file()}
        assert inside == {name for name in files if "__pycache__" not in name}


def test_the_strangers_technique_is_listed(stranger: Environment) -> None:
    listed = stranger.json("rarefy", "techniques", "--json")
    assert [row["technique"] for row in listed] == ["pruning/bank-balanced"]
    assert listed[0]["distribution"] == "rarefy-bank-balanced 0.1.0"
    plugins = stranger.json("rarefy", "plugins", "list", "--json")
    assert [(p["name"], p["module"]) for p in plugins] == [("bank-balanced", "rarefy_bank_balanced")]


def test_the_strangers_technique_runs(stranger: Environment, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    report = stranger.json("rarefy", "--quiet", "run", "recipe.yaml", "--output", "run", "--json", cwd=tmp_path)
    assert report["status"] == "done"
    step = report["steps"][0]
    assert {layer["name"] for layer in step["layers"]} == {"1", "3"}
    figures = {m["name"]: m["value"] for m in step["measurements"]}
    assert figures["nonzero"] < 0.3 * figures["parameters"]
    assert (tmp_path / "run" / "report.html").exists()


def test_the_example_passes_its_tests_there(stranger: Environment, tmp_path: Path) -> None:
    done = stranger.run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / EXAMPLE / "tests", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout


def test_a_new_plugin_is_written_there(stranger: Environment, tmp_path: Path) -> None:
    done = stranger.run("rarefy", "plugins", "new", "pruning", "my-method", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rarefy-my-method" / "src" / "rarefy_my_method" / "my_method.py").exists()


def test_without_plugins_the_way_on_is_told(wheels: Path, tmp_path: Path) -> None:
    bare = Environment(tmp_path / "bare", wheels, ["rarefy"])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for command in (["techniques"], ["plugins", "list"]):
        listed = bare.run("rarefy", *command)
        assert (listed.returncode, "pip install rarefy-pruning" in listed.stdout) == (0, True)
    done = bare.run("rarefy", "run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "no technique is installed" in done.stderr
    assert "pip install rarefy-pruning" in done.stderr


@pytest.mark.parametrize("family", [Path(member).name for member in MEMBERS if member.startswith("plugins/")])
def test_one_plugin_brings_its_techniques_alone(family: str, wheels: Path, tmp_path: Path) -> None:
    alone = Environment(tmp_path / "alone", wheels, [f"rarefy-{family}"])
    listed = alone.json("rarefy", "techniques", "--json")
    assert listed
    assert {row["technique"].partition("/")[0] for row in listed} == {family}
    checked = alone.json("rarefy", "plugins", "check", "--json")
    assert checked["broken"] == {}
