"""ONNX files whose convolutions and products run on 8-bit integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rarefy.task import Task
from torch import nn

from rarefy_quantization.execution.config import OnnxInt8Format
from rarefy_quantization.execution.exporter import QuantizedOnnxExporter

if TYPE_CHECKING:
    import onnx

    from rarefy_quantization.execution.codes import RowCodes
    from rarefy_quantization.execution.graph import Graph, Kernel

OPERATORS = ("Conv", "Gemm", "MatMul")


class OnnxInt8Exporter(QuantizedOnnxExporter[OnnxInt8Format]):
    """Weights as signed integers with a scale per output, activations as unsigned ones with a zero point per tensor."""

    suffix = ".int8.onnx"

    def quantize_(self, graph: Graph, model: nn.Module, task: Task) -> None:
        """Calibrate the activations, and let the kernels read integers."""
        from rarefy_quantization.execution.mixed import layers_in_float, patterns
        from rarefy_quantization.execution.saturation import REMEDY, saturates

        integers = _Integers(graph, model, task, self.config)
        self.notes += integers.notes
        if saturates():
            self.notes.append(REMEDY)
        kept: list[str] = []
        target = self.config.target
        if target is not None:

            def build(exclude: Sequence[str]) -> onnx.ModelProto:
                other = self.graph()
                _prepare_(other)
                integers.apply_(other, exclude)
                return self.finished(other)

            kept, words = layers_in_float(self.float32, graph, integers.kernels, build, task, self.config, target)
            self.notes.append(words)
        integers.apply_(graph, patterns(kept))


class _Integers:
    """The codes of all layers and the grids of all tensors that may become integers."""

    def __init__(self, graph: Graph, model: nn.Module, task: Task, config: OnnxInt8Format) -> None:
        from rarefy_quantization.execution.activations import activation_grids
        from rarefy_quantization.execution.graph import find_kernels
        from rarefy_quantization.execution.regions import quantized_tensors

        _prepare_(graph)
        self._exclude = config.exclude
        self.kernels, left = find_kernels(graph, OPERATORS, self._exclude)
        tensors = quantized_tensors(graph, self.kernels)
        batches = task.calibration(config.calibration_batch_size, config.batches)
        owned = activation_grids(graph, sorted(set(tensors.values())), batches, config)
        self._grids = {tensor: owned[owner] for tensor, owner in tensors.items()}
        self._codes = {kernel.node.input[1]: _codes(kernel, model) for kernel in self.kernels}
        self.notes = [*_words(self._codes), *left]

    def apply_(self, graph: Graph, exclude: Sequence[str]) -> None:
        """Let the layers of a prepared graph read integers, but for those that match the patterns of `exclude`."""
        from rarefy_quantization.execution.graph import find_kernels
        from rarefy_quantization.execution.qdq import drop_clamps_, quantize_tensors_, quantize_weight_
        from rarefy_quantization.execution.regions import quantized_tensors

        kernels, _ = find_kernels(graph, OPERATORS, (*self._exclude, *exclude))
        grids = {tensor: self._grids[tensor] for tensor in quantized_tensors(graph, kernels)}
        steps = {kernel.node.output[0]: grids[kernel.data].step.item() for kernel in kernels}
        for kernel in kernels:
            quantize_weight_(graph, kernel, self._codes[kernel.node.input[1]], steps[kernel.node.output[0]])
        drop_clamps_(graph, grids)
        quantize_tensors_(graph, grids)


def _prepare_(graph: Graph) -> None:
    from rarefy_quantization.execution.regions import normalize_by_convolution_, pool_globally_

    pool_globally_(graph)
    normalize_by_convolution_(graph)


def _codes(kernel: Kernel, model: nn.Module) -> RowCodes:
    from rarefy_quantization.execution.codes import row_codes

    before = dict(model.named_parameters()).get(kernel.node.input[1])
    return row_codes(kernel.rows(), None if before is None else before.detach().flatten(1).numpy())


def _words(codes: dict[str, RowCodes]) -> list[str]:
    found = sum(code.found for code in codes.values())
    return [f"{found} of {len(codes)} weights consisted of 8-bit codes already, which the file holds as they are"]
