"""What a run ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

import rarefy
from rarefy.registry import Registry


def environment(registry: Registry) -> dict[str, str]:
    """Return versions, machine and threads; no paths and no host names."""
    loaded = {plugin.name: f"{plugin.distribution} {plugin.version}" for plugin in registry.plugins}
    return {
        "rarefy": rarefy.__version__,
        **{f"plugin {name}": text for name, text in sorted(loaded.items())},
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
