"""What the formats with quantized weights have in common: the float32 file they start from, and how they are judged."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rarefy.exporter import Exporter
from rarefy.exporters.config import OnnxFormat
from rarefy.exporters.onnx import OnnxExporter, OnnxModel, require
from rarefy.modules import Base
from rarefy.task import Task
from rarefy_schemas import Measurement
from torch import nn

from rarefy_quantization.execution.config import QuantizedOnnxFormat
from rarefy_quantization.execution.verdict import Verdict

if TYPE_CHECKING:
    from onnx import ModelProto

    from rarefy_quantization.execution.graph import Graph

ConfigT = TypeVar("ConfigT", bound=QuantizedOnnxFormat)


class QuantizedOnnxExporter(Exporter[ConfigT]):
    """Changes the graph of the float32 file, which it is measured beside."""

    tolerance = math.inf

    def quantize_(self, graph: Graph, model: nn.Module, task: Task) -> None:
        """Change the graph of the float32 file."""
        raise NotImplementedError

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Write the quantized file; raise `RarefyError` when the extra is absent, `StageError` when nothing fits."""
        (onnx,) = require("onnx")
        self.float32 = self._float_file(model, base, task)
        graph = self.graph()
        self.quantize_(graph, model, task)
        onnx.save(self.finished(graph), path)
        if self._tables:
            self.notes.append(f"{self._tables} tables of embeddings have 8 bits")
        self._bytes = path.stat().st_size

    def graph(self) -> Graph:
        """Return the graph of the float32 file, fresh."""
        import onnx

        from rarefy_quantization.execution.graph import Graph

        return Graph(onnx.load_model_from_string(self.float32))

    def finished(self, graph: Graph) -> ModelProto:
        """Return the model of a changed graph, its tables of embeddings in 8 bits."""
        from rarefy_quantization.execution.embeddings import quantize_embeddings_

        self._tables = quantize_embeddings_(graph, self.config.exclude)
        return graph.finished()

    def reopen(self, path: Path, base: Base) -> OnnxModel:
        """Open a session of ONNX Runtime on the CPU."""
        return OnnxModel(path)

    def measure(self, model: nn.Module, reopened: Callable[..., Any], task: Task) -> list[Measurement]:
        """Return error and metric of the file just written, and its bytes and time beside the float32 file's."""
        verdict = Verdict(self.config, model, task)
        found = [*verdict.error(reopened), *verdict.scores(reopened)]
        found += verdict.cost(reopened, self._bytes, self.float32)
        self.notes += verdict.notes
        return found

    def _float_file(self, model: nn.Module, base: Base, task: Task) -> bytes:
        config = OnnxFormat(opset=self.config.opset, dynamic_batch=self.config.dynamic_batch)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            OnnxExporter(config).write(model, base, task, path)
            return path.read_bytes()
