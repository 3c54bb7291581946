"""ONNX by torch's exporter, opened again by ONNX Runtime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.errors import RarefyError, StageError
from rarefy.exporter import Exporter
from rarefy.exporters.batching import quiet, traced_inputs
from rarefy.exporters.config import OnnxFormat
from rarefy.modules import Base
from rarefy.task import Task

_LARGEST = 2**31 - 2**20


class OnnxExporter(Exporter[OnnxFormat]):
    """Writes one file with the weights inside."""

    suffix = ".onnx"

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Trace the model and write it; raise `RarefyError` when the extra is not installed."""
        _require("onnx", "onnxscript", "onnxruntime")
        size = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
        if size > _LARGEST:
            raise StageError(f"the model has {size} bytes and one .onnx file holds 2 GiB; export to torch-export")
        inputs, dynamic = traced_inputs(task, self.config.dynamic_batch)
        with quiet():
            torch.onnx.export(
                model,
                inputs,
                path,
                dynamo=True,
                dynamic_shapes=dynamic,
                opset_version=self.config.opset,
                external_data=False,
                verbose=False,
            )

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Open a session of ONNX Runtime on the CPU."""
        (onnxruntime,) = _require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

        def run(*inputs: Any) -> list[torch.Tensor]:
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            feed = {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(output) for output in session.run(None, feed)]

        return run


def _require(*modules: str) -> list[Any]:
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise RarefyError(f"the format onnx needs {error.name}; `pip install 'rarefy[onnx]'` provides it") from error
