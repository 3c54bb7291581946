"""What benchmarks keep, so that a call goes on where the last one stopped: results by name, and trained models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Runs:
    """Results by name, each written as soon as it is there, beside those that another process wrote meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = self._read()

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a result, made now when it is missing."""
        if key not in self.done:
            made = make()
            self.done = {**self._read(), key: made}
            self.path.write_text(json.dumps(self.done, indent=1, sort_keys=True) + "\n")
            print(f"{key}: {self.done[key]}", flush=True)
        return self.done[key]

    def _read(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}


def trained_once(model: Any, file: Path | None, train: Callable[[], Any]) -> Any:
    """Return a model in evaluation mode, with the weights of a file when it is there, else trained and kept in it."""
    from safetensors.torch import load_file, save_file

    if file and file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    train()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    return model.eval()


def spread(percentages: list[float]) -> str:
    """Return the mean of some percentages, with the least and the greatest."""
    return f"{statistics.mean(percentages):.2f} % ({min(percentages):.2f} to {max(percentages):.2f})"
