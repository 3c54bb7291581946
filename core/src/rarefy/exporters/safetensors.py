"""Plain tensors in the safetensors format, with the architecture in the file's metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rarefy_schemas import ModelSpec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rarefy.artifact import assemble
from rarefy.artifact.filling import tensors_of
from rarefy.exporter import Exporter
from rarefy.exporters.config import SafetensorsFormat
from rarefy.modules import Base, describe
from rarefy.task import Task


class SafetensorsExporter(Exporter[SafetensorsFormat]):
    """Writes each tensor once; tied names are in the architecture."""

    suffix = ".safetensors"
    tolerance = 1e-6

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Write tensors and architecture."""
        spec = describe(model, base)
        # a copy each, since safetensors refuses tensors that share memory
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors_of(model).items()}
        save_file(tensors, path, {"format": "pt", "rarefy": spec.model_dump_json(exclude_defaults=True)})

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Build the architecture and fill in the tensors."""
        with safe_open(path, "pt") as file:
            spec = ModelSpec.model_validate_json(file.metadata()["rarefy"])
            return assemble(spec, {name: file.get_tensor(name) for name in file.keys()}, base)  # noqa: SIM118
