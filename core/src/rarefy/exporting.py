"""One exported file: written beside, re-opened, compared with the model in memory, and only then put in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rarefy_schemas import ExporterConfig, ExportReport
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.errors import RarefyError, StageError
from rarefy.exporter import Exporter
from rarefy.files import atomic_write, make_folder
from rarefy.modules import Base
from rarefy.modules.skeleton import skeleton
from rarefy.nouns import implement, implementation
from rarefy.task import Task


def export_one(
    model: nn.Module, base: Base, task: Task, config: ExporterConfig, directory: Path, original_bytes: int
) -> ExportReport:
    """Write `model` to `directory` by `export_to`, under the name in the options; the folder is made."""
    make_folder(directory)
    path = directory / f"{config.name}{implementation(type(config)).suffix}"
    return export_to(path, model, base, task, config, original_bytes)


def export_to(
    path: Path, model: nn.Module, base: Base, task: Task, config: ExporterConfig, original_bytes: int
) -> ExportReport:
    """Write `model` to `path` in the format of `config`, and report its bytes and exactness.

    Outputs are compared on `task.example_inputs` of one sample and of three, and what the exporter itself measures is
    reported too. `original_bytes` is the size of the original network's float32 file. Raises `StageError`, leaving no
    new file, when the format cannot hold the model or when the re-opened file gives other outputs.
    """
    exporter: Exporter[Any] = implement(config)
    name = config.registered_name()
    model = copy.deepcopy(model).cpu().eval()
    with atomic_write(path) as temporary, torch.no_grad():
        try:
            exporter.write(model, base, task, temporary)
            reopened = exporter.reopen(temporary, base)
            difference = _compared(model, reopened, exporter, task)
            measurements = exporter.measure(model, reopened, task)
        except (RarefyError, OSError):
            raise
        except Exception as error:  # exporters call libraries and the model's own code, which may raise anything
            raise StageError(f"the model cannot be exported to {name}: {_shortened(error)}{_advice(config)}") from error
        size = temporary.stat().st_size
    small = size < original_bytes
    notes = (*exporter.notes, *(() if small else ("this file is not smaller than the original's float32 file",)))
    return ExportReport(
        format=name,
        path=f"{path.resolve().parent.name}/{path.name}",
        bytes=size,
        rate=original_bytes / size,
        max_difference=difference,
        measurements=tuple(measurements),
        notes=notes,
    )


def float32_bytes(base: Base) -> int:
    """Return the bytes of the base's parameters and buffers, each once, floating-point ones as float32."""
    model = skeleton(base)
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * (4 if tensor.is_floating_point() else tensor.itemsize) for tensor in tensors)


def _compared(model: nn.Module, reopened: Callable[..., Any], exporter: Exporter[Any], task: Task) -> float:
    """Return the largest absolute difference of outputs; raise `StageError` when it is too large."""
    name = exporter.config.registered_name()
    largest = 0.0
    for size in (1, 3) if getattr(exporter.config, "dynamic_batch", True) else (1,):
        expected = _tensors(model(*task.example_inputs(size)))
        found = _tensors(reopened(*task.example_inputs(size)))
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
            raise StageError(f"the {name} file gives outputs of other shapes than the model for {size} samples")
        for one, other in zip(expected, found, strict=True):
            difference = _largest(one.double() - other.double())
            if not difference <= exporter.tolerance * max(1.0, _largest(one.double())):
                raise StageError(
                    f"the {name} file gives other outputs than the model, by up to {difference:.3g} for {size} "
                    "samples, and was not kept; the model may depend on its batch size or on something that is "
                    f"neither a tensor nor a plain attribute{_advice(exporter.config)}"
                )
            largest = max(largest, difference)
    return largest


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _largest(values: torch.Tensor) -> float:
    """Return the largest magnitude; NaN when there is one, since no difference can be told then."""
    return float(values.abs().max()) if values.numel() else 0.0


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 600 else f"{text[:600]}..."


def _advice(config: ExporterConfig) -> str:
    return "; try `dynamic_batch: false`" if getattr(config, "dynamic_batch", False) else ""
