"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.exporter import Exporter
from rarefy.exporters.config import OnnxFormat
from rarefy.exporters.torch_export import exported
from rarefy.modules import Base
from rarefy.task import Task


class OnnxExporter(Exporter[OnnxFormat]):
    """Goes through torch.export; weights are inside the file."""

    suffix = ".onnx"

    def write(self, model: nn.Module, base: Base, task: Task, path: Path) -> None:
        """Convert and save."""
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _needed(name)
        with _silent():
            program = torch.onnx.export(
                exported(model, task, self.config.dynamic_batch),
                opset_version=self.config.opset,
                dynamo=True,
                verbose=False,
                external_data=False,
            )
            assert program is not None
            program.save(str(path))

    def reopen(self, path: Path, base: Base) -> Callable[..., Any]:
        """Open a session of ONNX Runtime on the CPU."""
        runtime = _needed("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def call(*inputs: torch.Tensor) -> list[torch.Tensor]:
            given = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
            return [torch.from_numpy(output) for output in session.run(None, given)]

        return call


def _needed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RarefyError(f"export to ONNX needs {name}: pip install 'rarefy[onnx]'") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the converter's chatter off the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
