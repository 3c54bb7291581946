"""The example plugin runs its own tests; `tests/test_stranger.py` installs it too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "contrib" / "example"


def test_the_example_passes_its_own_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=EXAMPLE, env={**os.environ, "PYTHONPATH": str(EXAMPLE / "src")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_its_method_file_is_as_short_as_promised() -> None:
    method = EXAMPLE / "src" / "rarefy_bank_balanced" / "bank_balanced.py"
    assert len(method.read_text().splitlines()) <= 30
