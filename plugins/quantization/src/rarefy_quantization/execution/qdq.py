"""Quantized tensors in a graph: pairs of QuantizeLinear and DequantizeLinear, which ONNX Runtime turns into kernels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto, helper

from rarefy_quantization.execution.codes import RowCodes
from rarefy_quantization.execution.graph import Array, Graph, Kernel, attributes
from rarefy_quantization.execution.regions import CLAMPS, JOINING, PASSING, bounds, operands
from rarefy_quantization.grids import Grid

ROUNDED = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose weights ONNX Runtime rounds by itself when what they read is quantized."""
WEIGHT = "/wd"
"""End of the name of a weight that was given as integers."""
LARGEST_BIAS = 2**30
"""Largest integer of a bias: the kernel adds it to a sum in 32 bits."""
ZERO_ROW_BITS = 20
"""Bits of the bias of an output whose weights are all zero, so that any scale would do for them."""


def drop_clamps_(graph: Graph, grids: Mapping[str, Grid]) -> None:
    """Take out the clamps that a grid makes superfluous, as it has no values beyond them."""
    makers = graph.makers()
    for node in [node for node in graph.nodes if node.op_type in CLAMPS]:
        tensor, clamped = node.input[0], node.output[0]
        ends = bounds(graph, node)
        if clamped not in grids or tensor in grids or tensor not in makers or ends is None:
            continue
        step, low, high = (float(value) for value in (grids[clamped].step, grids[clamped].low, grids[clamped].high))
        if len(graph.users(tensor)) == 1 and ends[0] <= (low + 0.5) * step and ends[1] >= (high - 0.5) * step:
            graph.nodes.remove(node)
            maker = makers[tensor]
            maker.output[list(maker.output).index(tensor)] = clamped


def quantize_weight_(graph: Graph, kernel: Kernel, codes: RowCodes, data_scale: float) -> None:
    """Let a kernel read its weight and its bias as integers with scales; the bias has that of data times weight."""
    name = kernel.node.output[0]
    if kernel.bias is not None:
        bias = graph.constants[kernel.bias]
        codes = _widened(codes, bias, data_scale)
        scales = codes.scales * np.float32(data_scale)
        whole = np.rint(bias / scales.astype(np.float64)).astype(np.int32)
        kernel.node.input[2] = _dequantized(graph, f"{name}/b", whole, scales)
    stored = kernel.stored(codes.codes)
    kernel.node.input[1] = _dequantized(graph, f"{name}/w", stored, codes.scales, kernel.axis)


def quantize_tensors_(graph: Graph, grids: Mapping[str, Grid]) -> None:
    """Let whoever computes with integers read the nearest 8-bit values of the tensors of `grids`.

    So do others where the tensor comes from an integer kernel. What comes as floats they read as it is.
    """
    nodes = []
    pairs = {name: _pair(graph, name, grid) for name, grid in grids.items()}
    integers = _on_integers(graph, grids)
    made = {name for node in integers for name in node.output}
    for name, pair in pairs.items():
        graph.rename(name, f"{name}/d", graph.nodes if name in made else integers)
        pair += _spared(graph, name, grids[name])
    for name in graph.inputs:
        nodes += pairs.get(name, [])
    for node in graph.nodes:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in pairs:
                nodes += pairs[name]
                if name in graph.outputs and name in made:  # the outputs of the file keep their names
                    node.output[place] = pairs[name][0].input[0] = f"{name}/f"
                    pairs[name][1].output[0] = name
                    graph.rename(f"{name}/d", name, graph.nodes)
    graph.nodes = nodes


def _on_integers(graph: Graph, grids: Mapping[str, Grid]) -> list[NodeProto]:
    """Return the nodes that ONNX Runtime has integer kernels for, as their weights, or what they read and give, are."""
    found: list[NodeProto] = []
    made: set[str] = set()
    for node in graph.nodes:
        joined = node.op_type in PASSING + JOINING and node.output[0] in grids
        if (node.input[1:2] and node.input[1].endswith(WEIGHT)) or (joined and {*operands(node)} <= {*grids, *made}):
            found.append(node)
            made.update(node.output)
    return found


def _pair(graph: Graph, name: str, grid: Grid) -> list[NodeProto]:
    scale = graph.constant(f"{name}/s", np.float32(grid.step.item()).reshape(()))
    zero = graph.constant(f"{name}/z", np.uint8(-grid.low.item()).reshape(()))
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}/q"]),
        helper.make_node("DequantizeLinear", [f"{name}/q", scale, zero], [f"{name}/d"]),
    ]


def _spared(graph: Graph, name: str, grid: Grid) -> list[NodeProto]:
    """Let layers that stay in float32 read a tensor by a step per channel, all of them equal, and return the operators.

    ONNX Runtime rounds the weights of a layer that reads a tensor by one step, to 8 bits for all of them together, and
    no option of the file forbids it.
    """
    nodes: dict[int, NodeProto] = {}
    for node in graph.nodes:
        weight = graph.constants.get(node.input[1]) if node.op_type in ROUNDED else None
        if weight is None or node.input[0] != f"{name}/d":
            continue
        given = attributes(node)
        counted = 1 if node.op_type == "Conv" or given.get("transB", 0) else 0
        number = weight.shape[counted] * (given.get("group", 1) if node.op_type == "Conv" else 1)
        if number not in nodes:
            scales = graph.constant(f"{name}/s{number}", np.full(number, grid.step.item(), np.float32))
            zeros = graph.constant(f"{name}/z{number}", np.full(number, -grid.low.item(), np.uint8))
            outputs = [f"{name}/d{number}"]
            nodes[number] = helper.make_node("DequantizeLinear", [f"{name}/q", scales, zeros], outputs, axis=1)
        node.input[0] = nodes[number].output[0]
    return list(nodes.values())


def _dequantized(graph: Graph, name: str, codes: Array, scales: Array, axis: int = 0) -> str:
    """Add integers with a scale for each index of `axis`, and return the name of their product."""
    inputs = [
        graph.constant(name, codes),
        graph.constant(f"{name}s", scales.astype(np.float32)),
        graph.constant(f"{name}z", np.zeros(scales.shape, codes.dtype)),
    ]
    graph.nodes.insert(0, helper.make_node("DequantizeLinear", inputs, [f"{name}d"], axis=axis))
    return f"{name}d"


def _widened(codes: RowCodes, bias: Array, data_scale: float) -> RowCodes:
    """Return codes whose scales are coarse enough for the bias, and fine enough where all weights are zero."""
    least = np.abs(bias) / (data_scale * LARGEST_BIAS)
    free = ~codes.codes.any(1)
    of_bias = np.maximum(np.abs(bias), 1e-6) / (data_scale * 2.0**ZERO_ROW_BITS)
    scales = np.where(free, of_bias, np.maximum(codes.scales, least)).astype(np.float32)
    rows = np.rint(codes.codes * (codes.scales / scales)[:, None])
    return RowCodes(np.where(free[:, None], 0, rows).astype(np.int8), scales, codes.found)
