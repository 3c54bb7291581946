"""ONNX files whose linear layers have 4-bit weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.task import Task
from torch import nn

from rarefy_quantization.execution.config import OnnxInt4Format
from rarefy_quantization.execution.exporter import QuantizedOnnxExporter

if TYPE_CHECKING:
    from rarefy_quantization.execution.blocks import Blocks
    from rarefy_quantization.execution.graph import Graph, Kernel

DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4
"""Activations are rounded to 8 bits block by block inside the kernel, without which it is slower than float32."""


class OnnxInt4Exporter(QuantizedOnnxExporter[OnnxInt4Format]):
    """Products with a constant matrix become MatMulNBits, an operator of ONNX Runtime; all else stays in float32."""

    suffix = ".int4.onnx"

    def quantize_(self, graph: Graph, model: nn.Module, task: Task) -> None:
        """Replace the products."""
        from onnx import helper

        from rarefy_quantization.execution.blocks import blocks_of
        from rarefy_quantization.execution.graph import find_kernels

        kernels, left = find_kernels(graph, ("Gemm", "MatMul"), self.config.exclude)
        blocks = {kernel.node.input[1]: blocks_of(kernel.rows(), self.config.group_size) for kernel in kernels}
        found = sum(block.found for block in blocks.values())
        self.notes += [
            f"{found} of {len(blocks)} weights consisted of 4-bit codes already, which the file holds as they are",
            *left,
        ]
        nodes = {id(kernel.node): _product(graph, kernel, blocks[kernel.node.input[1]]) for kernel in kernels}
        graph.nodes = [new for node in graph.nodes for new in nodes.get(id(node), [node])]
        graph.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _product(graph: Graph, kernel: Kernel, blocks: Blocks) -> list[object]:
    """Return the nodes that stand for a product and the addition of its bias."""
    from onnx import helper

    name, (rows, inputs) = kernel.node.input[1], kernel.rows().shape
    arguments = [
        kernel.data,
        graph.constant(f"{name}/q", blocks.packed()),
        graph.constant(f"{name}/s", blocks.scales.reshape(-1)),
    ]
    if (blocks.zeros != 8).any():  # 8 is what the operator takes when it is given none
        arguments.append(graph.constant(f"{name}/z", blocks.packed_zeros()))
    output = kernel.node.output[0]
    product = output if kernel.bias is None else f"{output}/p"
    options = {"K": inputs, "N": rows, "bits": 4, "block_size": blocks.size, "accuracy_level": ACCURACY_LEVEL}
    nodes = [helper.make_node("MatMulNBits", arguments, [product], domain=DOMAIN, **options)]
    if kernel.bias is not None:
        nodes.append(helper.make_node("Add", [product, kernel.bias], [output]))
    return nodes
