"""Writing an export, opening it again, and comparing, before it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rarefy_schemas import ExporterConfig, ExportReport
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.artifact.filling import tensors_of
from rarefy.errors import StageError
from rarefy.exporter import Exporter
from rarefy.files import atomic_write, make_folder
from rarefy.modules import Base
from rarefy.nouns import implement
from rarefy.task import Task

_BATCHES = (1, 3)


def export_one(
    model: nn.Module, base: Base, task: Task, config: ExporterConfig, directory: Path, original_bytes: int
) -> ExportReport:
    """Write `model` into `directory` and return what was found when the file was opened again.

    `original_bytes` is the size of the original network's float32 file. Raises `StageError`, leaving no file, when
    the outputs of the file differ from the model's by more than the format's tolerance.
    """
    exporter: Exporter[Any] = implement(config)
    model = model.cpu().eval()
    path = directory / f"model{exporter.suffix}"
    make_folder(directory)
    with atomic_write(path) as temporary:
        exporter.write(model, base, task, temporary)
        difference = _difference(model, exporter, temporary, base, task)
    size = path.stat().st_size
    return ExportReport(
        format=config.registered_name(),
        path=f"{directory.name}/{path.name}",
        bytes=size,
        rate=original_bytes / size,
        max_difference=difference,
    )


def float32_bytes(base: Base) -> int:
    """Return the bytes of the base's tensors, floating-point ones counted at four bytes each."""
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors_of(base.build()).values()
    )


def _difference(model: nn.Module, exporter: Exporter[Any], path: Path, base: Base, task: Task) -> float:
    """Return the largest absolute difference of outputs, over two batch sizes where the file allows that."""
    opened = exporter.reopen(path, base)
    batches = _BATCHES if getattr(exporter.config, "dynamic_batch", True) else (2,)
    worst = 0.0
    for batch in batches:
        inputs = task.example_inputs(batch)
        with torch.no_grad():
            expected, found = tree_leaves(model(*inputs)), tree_leaves(opened(*inputs))
        for one, other in zip(expected, found, strict=True):
            if not isinstance(one, torch.Tensor):
                continue
            difference = float((one - torch.as_tensor(other)).abs().max()) if one.numel() else 0.0
            limit = exporter.tolerance * max(1.0, float(one.abs().max()) if one.numel() else 0.0)
            if not difference <= limit:
                raise StageError(
                    f"the {exporter.config.registered_name()!r} file gives outputs that differ by {difference:.3g} "
                    f"from the model's (allowed: {limit:.3g}); it is not kept; choose another format"
                )
            worst = max(worst, difference)
    return worst
