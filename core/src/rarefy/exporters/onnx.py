"""ONNX by torch's exporter, opened again by ONNX Runtime."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from rarefy.errors import RarefyError, StageError
from rarefy.exporter import Exporter
from rarefy.exporters.batching import quiet, traced_inputs
from rarefy.exporters.config import OnnxFormat
from rarefy.modules import Base
from rarefy.task import Task

_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST = 2**31 - 2**20


class OnnxExporter(Exporter[OnnxFormat]):
    """Writes one file with the weights inside."""

    suffix = ".onnx"

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Trace the model and write it; raise `RarefyError` when the extra is not installed."""
        onnx, *_ = require("onnx", "onnxscript", "onnxruntime")
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
        onnx.save(_without_traces(onnx.load(path)), path)

    def reopen(self, path: Path, base: Base) -> OnnxModel:
        """Open a session of ONNX Runtime on the CPU."""
        return OnnxModel(path)


def _without_traces(model: Any) -> Any:
    """Return a file's content without the exporter's notes, paths of source files among them, but for module names."""
    graph = model.graph
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        kept = [entry for entry in holder.metadata_props if entry.key == _SCOPES]
        holder.ClearField("metadata_props")
        holder.metadata_props.extend(kept)
    return model


class OnnxModel(nn.Module):
    """A file in ONNX Runtime on the CPU, called like the model it was written from.

    It computes with as many threads as torch has when it is opened. `structure` is that of the model's outputs; without
    one they are a list.
    """

    def __init__(self, source: Path | bytes, structure: TreeSpec | None = None) -> None:
        super().__init__()
        (onnxruntime,) = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        self.structure = structure

    def forward(self, *inputs: Any) -> Any:
        """Run the file on the tensors among the model's positional inputs."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        feed = {name: tensor.detach().numpy() for name, tensor in zip(self.names, tensors, strict=True)}
        outputs = [torch.from_numpy(output) for output in self.session.run(None, feed)]
        return outputs if self.structure is None else tree_unflatten(outputs, self.structure)


def require(*modules: str) -> list[Any]:
    """Return modules of the extra `onnx`; raise `RarefyError`, with the command to install it, when one is absent."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise RarefyError(f"the format onnx needs {error.name}; `pip install 'rarefy[onnx]'` provides it") from error
