"""Files written from models, opened again, and what ONNX Runtime makes of them."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from rarefy.exporting import export_one
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.tasks import ClassificationTask
from rarefy_schemas import ExporterConfig, ExportReport
from torch import nn


class Written:
    """One exported file."""

    def __init__(self, report: ExportReport, path: Path, model: nn.Module) -> None:
        self.report, self.path, self.model = report, path, model
        self.file = onnx.load(path)
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.file.graph.initializer}

    def value(self, name: str) -> float:
        return next(m.value for m in self.report.measurements if m.name == name)

    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self.file.graph.node)

    def kernels(self) -> set[str]:
        """Return the operators that ONNX Runtime runs for the file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(self.path.with_suffix(".optimized"))
        onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}

    def weights(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return integers and scales of the weights of each output tensor, int8."""
        names = [name for name, value in self.constants.items() if value.dtype == np.int8 and name.endswith("/w")]
        return {name: (self.constants[name], self.constants[f"{name}s"]) for name in names}


def random_task(*shape: int, samples: int = 96, outputs: int = 4) -> ClassificationTask:
    generator = np.random.default_rng(0)
    images = generator.normal(0.5, 1.0, size=(samples, *shape)).astype(np.float32)
    return ClassificationTask.from_arrays(images, generator.integers(0, outputs, samples), batch_size=16)


def written(model: nn.Module, task: Any, config: ExporterConfig, folder: Path) -> Written:
    report = export_one(model, as_base(model), task, config, folder, 10**9)
    return Written(report, folder / Path(report.path).name, model)


def quantized(model: nn.Module, config: Any, task: Any = None) -> nn.Module:
    technique = implement(config)
    changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    return technique.consolidate(changed).eval()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
