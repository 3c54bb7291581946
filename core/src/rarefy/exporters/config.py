"""Options of core's exporters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from rarefy_schemas import Coder, ExporterConfig


class RarefyFormat(ExporterConfig):
    """The `.rarefy` artifact: architecture as data, tensors losslessly coded, loaded by `rarefy.load`."""

    implementation: ClassVar[str] = "rarefy.exporters.rarefy:RarefyExporter"
    paper: ClassVar[str] = "docs/architecture.md"
    format: Literal["rarefy"] = "rarefy"
    coder: Coder = "range"
    """`range`: the smallest of all codings; `huffman`: distances and codes by Huffman codes, as Deep Compression stored
    them, larger, for comparison with published sizes."""


class SafetensorsFormat(ExporterConfig):
    """Plain tensors with the architecture in the file's metadata, readable by any safetensors library."""

    implementation: ClassVar[str] = "rarefy.exporters.safetensors:SafetensorsExporter"
    paper: ClassVar[str] = "the safetensors format"
    format: Literal["safetensors"] = "safetensors"


class OnnxFormat(ExporterConfig):
    """ONNX, checked with ONNX Runtime. Needs the extra `onnx`."""

    implementation: ClassVar[str] = "rarefy.exporters.onnx:OnnxExporter"
    paper: ClassVar[str] = "the ONNX standard"
    format: Literal["onnx"] = "onnx"
    opset: int = Field(default=18, ge=18)
    """Version of ONNX's operator set."""
    dynamic_batch: bool = True
    """Whether the first dimension of every input may vary."""


class TorchExportFormat(ExporterConfig):
    """torch.export's `.pt2` program, which runs without the code that built the model."""

    implementation: ClassVar[str] = "rarefy.exporters.torch_export:TorchExporter"
    paper: ClassVar[str] = "torch.export"
    format: Literal["torch-export"] = "torch-export"
    dynamic_batch: bool = True
    """Whether the first dimension of every input may vary."""


EXPORTERS: list[type[ExporterConfig]] = [RarefyFormat, SafetensorsFormat, OnnxFormat, TorchExportFormat]
