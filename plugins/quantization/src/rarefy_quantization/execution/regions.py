"""Which tensors of a graph become 8-bit integers, so that the layers between them run on integers."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from rarefy_quantization.execution.graph import Graph, Kernel, attributes

PASSING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""They move values only, so that their outputs lie on the grid of their input."""
JOINING = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Relu", "Clip", "LeakyRelu", "Sigmoid")
"""They have integer kernels whose output has a grid of its own."""
CLAMPS = ("Relu", "Clip")


def pool_globally_(graph: Graph) -> None:
    """Write means over height and width as `GlobalAveragePool`, which has an integer kernel."""
    for place, node in enumerate(graph.nodes):
        if node.op_type != "ReduceMean" or not attributes(node).get("keepdims", 1) or len(node.input) < 2:
            continue
        axes = graph.constants.get(node.input[1])
        if axes is not None and graph.rank(node.input[0]) == 4 and sorted(axes % 4) == [2, 3]:
            graph.nodes[place] = helper.make_node("GlobalAveragePool", node.input[:1], node.output)


def normalize_by_convolution_(graph: Graph) -> None:
    """Write batch norms behind a clamped convolution as convolutions of single channels, which have integer kernels.

    Those right behind a convolution were folded into it by torch's exporter.
    """
    makers = graph.makers()
    for place, node in enumerate(graph.nodes):
        maker = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if maker is None or maker.op_type not in CLAMPS or makers[maker.input[0]].op_type != "Conv":
            continue
        scale, shift, mean, variance = (graph.constants.get(name) for name in node.input[1:])
        dimensions = graph.rank(makers[maker.input[0]].input[0]) - 2
        if any(value is None for value in (scale, shift, mean, variance)) or dimensions < 1:
            continue
        factor = scale / np.sqrt(variance + np.float32(attributes(node).get("epsilon", 1e-5)))
        weight = graph.constant(f"{node.output[0]}/n", factor.reshape(-1, 1, *[1] * dimensions))
        bias = graph.constant(f"{node.output[0]}/m", shift - mean * factor)
        inputs = [node.input[0], weight, bias]
        graph.nodes[place] = helper.make_node("Conv", inputs, node.output[:1], group=len(factor))


def quantized_tensors(graph: Graph, kernels: list[Kernel]) -> dict[str, str]:
    """Return the tensors to quantize, each with the one whose grid it shares, mostly itself.

    They are what kernels read; what convolutions give, as these have no kernel that gives floats; and what lies between
    such tensors and a kernel, when all operators on the way have integer kernels. A tensor that is only clamped and
    else unused is left out, as its clamped values are quantized instead.
    """
    wanted = {kernel.data for kernel in kernels}
    wanted |= {_clamped(graph, kernel.node.output[0]) for kernel in kernels if kernel.node.op_type == "Conv"}
    leading = _leading(graph, wanted)
    for node in graph.nodes:
        tensors = operands(node)
        if node.op_type in PASSING + JOINING and node.output[0] in leading and wanted.issuperset(tensors):
            wanted.add(_clamped(graph, node.output[0]))
    makers = graph.makers()
    for node in reversed(graph.nodes):
        if node.op_type in PASSING and node.output[0] in wanted:
            wanted.add(node.input[0])

    def owner(tensor: str) -> str:
        maker = makers.get(tensor)
        return owner(maker.input[0]) if maker is not None and maker.op_type in PASSING else tensor

    return {tensor: owner(tensor) for tensor in wanted}


def operands(node: NodeProto) -> list[str]:
    """Return what an operator computes with, and not by what parameters."""
    if node.op_type in ("Add", "Mul", "Concat"):
        return list(node.input)
    return list(node.input[:1])


def _leading(graph: Graph, wanted: set[str]) -> set[str]:
    """Return the tensors from which operators with integer kernels lead to one of `wanted`."""
    found = set(wanted)
    for node in reversed(graph.nodes):
        if node.op_type in PASSING + JOINING and node.output[0] in found:
            found.update(operands(node))
    return found


def _clamped(graph: Graph, tensor: str) -> str:
    """Return the clamped values of a tensor when nobody else reads it, else the tensor."""
    users = graph.users(tensor)
    alone = len(users) == 1 and tensor not in graph.outputs
    return str(users[0].output[0]) if alone and users[0].op_type in CLAMPS else tensor


def bounds(graph: Graph, node: NodeProto) -> tuple[float, float] | None:
    """Return the ends of the values that a clamp lets through, None when they are not constant."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    given = [graph.constants.get(name) if name else fallback for name, fallback in
             zip([*node.input[1:], "", ""], (np.array(-np.inf), np.array(np.inf)), strict=False)]  # fmt: skip
    return None if any(end is None for end in given) else (float(given[0]), float(given[1]))
