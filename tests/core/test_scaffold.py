"""What `rarefy plugins new` writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rarefy.errors import RecipeError
from rarefy.recipe import load_recipe
from rarefy.registry import Plugin, Registry, discover
from rarefy.scaffold import families, new_plugin

KINDS = [*families(), "a-family-of-its-own"]


def test_new_packages_keep_the_rules(tmp_path: Path) -> None:
    folders = [new_plugin(family, f"my-{family}", tmp_path) for family in KINDS]
    sources = os.pathsep.join(str(folder / "src") for folder in folders)
    variables = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
    # in one process, since a fresh one spends most of its time on importing torch
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-W", "error", "-p", "no:cacheprovider", *map(str, folders)],
        cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    files = [file.name for folder in folders for file in folder.glob("tests/test_*.py")]
    assert len(files) == len(KINDS)
    assert all(re.search(rf"{re.escape(file)}::.* PASSED", done.stdout) for file in files)


@pytest.mark.parametrize("family", KINDS)
def test_the_new_package_is_named_and_small(family: str, tmp_path: Path) -> None:
    folder = new_plugin(family, "my-method", tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == folder.name == "rarefy-my-method"
    assert project["entry-points"]["rarefy"] == {"my-method": "rarefy_my_method"}
    assert len((folder / "src" / "rarefy_my_method" / "my_method.py").read_text().splitlines()) <= 30


@pytest.mark.parametrize("family", KINDS)
def test_the_new_package_is_clean(family: str, tmp_path: Path) -> None:
    folder = new_plugin(family, "my-method", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select=E,F,I,B,UP", "--line-length=120"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert not [path for path in folder.rglob("*") if path.is_file() and "${" in path.read_text()]


@pytest.mark.parametrize("family", KINDS)
def test_the_new_recipe_is_valid(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_plugin(family, f"my-{family}", tmp_path)
    monkeypatch.syspath_prepend(folder / "src")
    plugin = Plugin("mine", folder.name, "0.1.0", f"rarefy_my_{family.replace('-', '_')}", "installed")
    recipe = load_recipe(folder / "recipe.yaml", registry=Registry([*discover(), plugin]))
    assert f"{family}/my-{family}" in recipe.model_dump_json()


@pytest.mark.parametrize(
    "name", ["My-Method", "my_method", "-method", "method-", "2fast", "my--method", "", "a/b", ".."]
)
def test_a_bad_name_is_refused_with_a_good_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lower-case words joined by hyphens"):
        new_plugin("pruning", name, tmp_path)
    with pytest.raises(RecipeError, match="family"):
        new_plugin(name, "my-method", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_suggested_name_is_the_given_one_in_kebab_case(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'my-method2'"):
        new_plugin("pruning", "MyMethod2", tmp_path)


@pytest.mark.parametrize("name", ["pruning", "schemas", "config", "none"])
def test_a_name_that_would_clash_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"'my-{name}'"):
        new_plugin("pruning", name, tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = new_plugin("pruning", "my-method", tmp_path)
    (folder / "README.md").write_text("mine")
    with pytest.raises(RecipeError, match="exists already"):
        new_plugin("pruning", "my-method", tmp_path)
    assert (folder / "README.md").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="choose another --directory"):
        new_plugin("pruning", "my-method", tmp_path / "file")
