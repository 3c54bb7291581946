"""Guards over the whole workspace."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MEMBERS = [ROOT / "schemas", ROOT / "core", *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
OWN = re.compile(r"^rarefy(-\w+)?\b")


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def foreign(requirements: list[str]) -> set[str]:
    return {text for text in requirements if not OWN.match(text)}


def test_the_root_is_the_union_of_its_members() -> None:
    root, members = project(ROOT), [project(folder) for folder in MEMBERS]
    assert set(root["project"]["dependencies"]) == set().union(
        *(foreign(m["project"]["dependencies"]) for m in members)
    )
    points = [m["project"].get("entry-points", {}).get("rarefy", {}) for m in members]
    assert root["project"]["entry-points"]["rarefy"] == {k: v for point in points for k, v in point.items()}
    assert root["project"]["scripts"] == project(ROOT / "core")["project"]["scripts"]
    extras = project(ROOT / "core")["project"]["optional-dependencies"]
    assert {name: root["project"]["optional-dependencies"][name] for name in extras} == extras
    packages = {str((f / p).relative_to(ROOT)) for f, m in zip(MEMBERS, members, strict=True)
                for p in m["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}  # fmt: skip
    assert set(root["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages


def test_all_members_have_one_version() -> None:
    import rarefy

    versions = {project(folder)["project"]["version"] for folder in [ROOT, *MEMBERS]}
    assert versions == {rarefy.__version__}


@pytest.mark.parametrize("family", sorted(path.name for path in ROOT.glob("plugins/*")))
def test_a_family_imports_no_other_family(family: str) -> None:
    families = {f"rarefy_{path.name}" for path in ROOT.glob("plugins/*")} - {f"rarefy_{family}"}
    for file in (ROOT / "plugins" / family).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & families, file


def imported(*command: str) -> set[str]:
    """Return the top-level modules that a command of the installed program imports."""
    code = (
        "import sys; from rarefy.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code, e"
    )
    code += "\nprint('MODULES', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("MODULES", 1)[1].split())


@pytest.mark.parametrize("command", [("--help",), ("plugins", "list"), ("--version",), ("completion", "bash")])
def test_help_plugins_and_completion_import_nothing_heavy(command: tuple[str, ...]) -> None:
    modules = imported(*command)
    assert "click" in modules
    assert not modules & {"torch", "pydantic", "rich", "numpy", "matplotlib", "accelerate", "rarefy_schemas"}


@pytest.mark.parametrize(
    "command", [("techniques",), ("techniques", "pruning/magnitude"), ("schema",), ("plugins", "list", "--json")]
)
def test_listing_and_validating_import_no_torch(command: tuple[str, ...]) -> None:
    assert not imported(*command) & {"torch", "matplotlib", "accelerate"}


def test_validating_a_recipe_imports_no_torch() -> None:
    assert "torch" not in imported("validate", "quickstart")


def test_listing_the_shipped_recipes_imports_no_torch() -> None:
    assert not imported("recipes") & {"torch", "pydantic"}


def test_the_generated_pages_are_those_of_the_first_party_configs() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_tracked_file_names_a_machine() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = done.stdout.split() if done.returncode == 0 else []
    paths = re.compile(r"(^|[\s\"'=(])/(work|root|home|opt)/\w")
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".json", ""} and path.is_file():
            assert not paths.search(path.read_text(errors="ignore")), name
