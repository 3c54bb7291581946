"""ONNX files whose convolutions and products run on 8-bit integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.task import Task
from torch import nn

from rarefy_quantization.execution.config import OnnxInt8Format
from rarefy_quantization.execution.exporter import QuantizedOnnxExporter

if TYPE_CHECKING:
    from rarefy_quantization.execution.codes import RowCodes
    from rarefy_quantization.execution.graph import Graph, Kernel


class OnnxInt8Exporter(QuantizedOnnxExporter[OnnxInt8Format]):
    """Weights as signed integers with a scale per output, activations as unsigned ones with a zero point per tensor."""

    suffix = ".int8.onnx"

    def quantize_(self, graph: Graph, model: nn.Module, task: Task) -> None:
        """Calibrate the activations, and let the kernels read integers."""
        from rarefy_quantization.execution.activations import activation_grids
        from rarefy_quantization.execution.graph import find_kernels
        from rarefy_quantization.execution.qdq import drop_clamps_, quantize_tensors_, quantize_weight_
        from rarefy_quantization.execution.regions import (
            normalize_by_convolution_,
            pool_globally_,
            quantized_tensors,
        )

        pool_globally_(graph)
        normalize_by_convolution_(graph)
        kernels, left = find_kernels(graph, ("Conv", "Gemm", "MatMul"), self.config.exclude)
        tensors = quantized_tensors(graph, kernels)
        batches = task.calibration(self.config.calibration_batch_size, self.config.batches)
        owned = activation_grids(graph, sorted(set(tensors.values())), batches, self.config)
        grids = {tensor: owned[owner] for tensor, owner in tensors.items()}
        codes = {kernel.node.input[1]: _codes(kernel, model) for kernel in kernels}
        self.notes += [*_words(codes), *left]
        steps = {kernel.node.output[0]: grids[kernel.data].step.item() for kernel in kernels}
        for kernel in kernels:
            quantize_weight_(graph, kernel, codes[kernel.node.input[1]], steps[kernel.node.output[0]])
        drop_clamps_(graph, grids)
        quantize_tensors_(graph, grids)


def _codes(kernel: Kernel, model: nn.Module) -> RowCodes:
    from rarefy_quantization.execution.codes import row_codes

    before = dict(model.named_parameters()).get(kernel.node.input[1])
    return row_codes(kernel.rows(), None if before is None else before.detach().flatten(1).numpy())


def _words(codes: dict[str, RowCodes]) -> list[str]:
    found = sum(code.found for code in codes.values())
    return [f"{found} of {len(codes)} weights consisted of 8-bit codes already, which the file holds as they are"]
