"""The tutorial does what it says: titled blocks are written as files, bash blocks run, text blocks are their output."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(**match.groupdict()) for match in BLOCK.finditer(page.read_text())]


def environment(folder: Path) -> dict[str, str]:
    """Make an environment that sees ours and can be installed into; return the variables that select it."""
    venv.create(folder, symlinks=True)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    (folder / "pip").write_text(
        f'#!/bin/sh\n[ "$1" = install ] && shift && set -- install --no-build-isolation "$@"\n'
        f'exec {sys.executable} -m pip --python {folder}/bin/python "$@"\n'
    )
    (folder / "pip").chmod(0o755)
    for name, command in (
        # the build backend comes from ours too, so that no test waits for a package index
        ("pip", f"env PIP_NO_INDEX=1 {folder}/pip"),
        ("pytest", f"{folder}/bin/python -m pytest -p no:cacheprovider"),
        ("rarefy", f"{folder}/bin/python -m rarefy"),
    ):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAREFY", "PYTEST"))}
    # small networks train far slower on two busy threads than on one
    added = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    return kept | added | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.timeout(900)
def test_the_tutorial_for_plugins(tmp_path: Path) -> None:
    variables, work = environment(tmp_path / "environment"), tmp_path / "work"
    work.mkdir()
    output = ""
    for block in blocks(ROOT / "docs" / "tutorial-plugin.md"):
        if block.title is not None:
            (work / block.title).parent.mkdir(parents=True, exist_ok=True)
            (work / block.title).write_text(block.text)
        elif block.language == "bash":
            done = subprocess.run(
                ["bash", "-euc", block.text], cwd=work, env=variables, capture_output=True, text=True, check=False
            )
            output = done.stdout
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        elif output:
            for line in block.text.splitlines():
                pattern = re.sub(r"([*?[])", r"[\1]", line.rstrip()).replace("...", "*")
                assert fnmatch.filter(output.splitlines(), pattern), f"no line like {line!r} in:\n{output}"
    assert len((work / "rarefy-relative/src/rarefy_relative/relative.py").read_text().splitlines()) <= 30
    assert (work / "runs/relative/report.html").exists()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(page), "exec")
