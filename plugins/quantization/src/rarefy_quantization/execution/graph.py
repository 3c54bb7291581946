"""An ONNX graph that nodes are replaced in, and its layers whose weights are constant."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from rarefy.errors import StageError

Array = NDArray[Any]


LAYERS = ("Conv", "Gemm", "MatMul", "Gather")
"""Operators that stand for layers with weights."""


class Graph:
    """A model's nodes, in an order in which they can be computed, and its constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.scopes = {node.output[0]: _scopes(node) for node in self.nodes}
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        for holder in (model, model.graph, *self.nodes, *model.graph.input, *model.graph.output):
            holder.ClearField("metadata_props")  # the exporter's traces, with the paths of source files

    def users(self, tensor: str) -> list[NodeProto]:
        """Return the nodes that read a tensor."""
        return [node for node in self.nodes if tensor in node.input]

    def makers(self) -> dict[str, NodeProto]:
        """Return the node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output}

    def rank(self, tensor: str) -> int:
        """Return the number of dimensions of a tensor; -1 when the file does not tell it."""
        values = (*self.model.graph.value_info, *self.model.graph.input)
        shapes = (value.type.tensor_type.shape for value in values if value.name == tensor)
        return next((len(shape.dim) for shape in shapes), -1)

    def constant(self, name: str, value: Array) -> str:
        """Add a constant and return its name."""
        self.constants[name] = value
        return name

    def rename(self, old: str, new: str, nodes: Sequence[NodeProto]) -> None:
        """Let those of `nodes` that read `old` read `new`."""
        for node in nodes:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new

    def finished(self) -> onnx.ModelProto:
        """Return the model with the nodes as they are now, and the constants that they read."""
        read = {name for node in self.nodes for name in node.input} | set(self.outputs)
        graph = self.model.graph
        for field, values in (
            ("node", self.nodes),
            ("initializer", [numpy_helper.from_array(v, n) for n, v in self.constants.items() if n in read]),
        ):
            graph.ClearField(field)
            getattr(graph, field).extend(values)
        graph.ClearField("value_info")
        return self.model


@dataclass(frozen=True)
class Kernel:
    """A convolution or a product with a constant weight."""

    node: NodeProto
    layer: str
    """Name of the module, as well as the file tells it."""
    weight: Array
    """As it is stored."""
    axis: int
    """Dimension of the stored weight that counts the outputs."""

    @property
    def data(self) -> str:
        """Name of the tensor that is multiplied with the weight."""
        return str(self.node.input[0])

    @property
    def bias(self) -> str | None:
        """Name of the bias."""
        return self.node.input[2] if len(self.node.input) > 2 and self.node.input[2] else None

    def rows(self) -> Array:
        """Return the weight as `(out, inputs)`."""
        moved = np.moveaxis(self.weight, self.axis, 0)
        return moved.reshape(len(moved), math.prod(moved.shape[1:]))

    def stored(self, rows: Array) -> Array:
        """Undo `rows`."""
        shape = np.moveaxis(self.weight, self.axis, 0).shape
        return np.ascontiguousarray(np.moveaxis(rows.reshape(shape), 0, self.axis))


def find_kernels(graph: Graph, operators: Sequence[str], exclude: Sequence[str]) -> tuple[list[Kernel], list[str]]:
    """Return the layers of `operators` (`Conv`, `Gemm`, `MatMul`), and words about those that stay in float32.

    Raises `StageError` when there is none, for a pattern of `exclude` that matches none, and for weights that are not
    finite.
    """
    found, left = [], []
    layers = {_layer(graph, node) for node in graph.nodes if node.op_type in LAYERS}
    if unused := [pattern for pattern in exclude if not any(fnmatchcase(layer, pattern) for layer in layers)]:
        raise StageError(
            f"`exclude` has {', '.join(map(repr, unused))}, which matches no layer; the layers are "
            f"{', '.join(sorted(layers))}"
        )
    for node in graph.nodes:
        if node.op_type not in operators:
            continue
        layer, reason = _layer(graph, node), _obstacle(graph, node)
        if reason is not None:
            left.append(f"{layer!r} stays in float32: {reason}")
        elif not any(fnmatchcase(layer, pattern) for pattern in exclude):
            found.append(_kernel(graph, node, layer))
    if not found:
        given = sorted({node.op_type for node in graph.nodes})
        raise StageError(
            f"the model has nothing to quantize: no {' or '.join(operators)} with a constant weight that is not "
            f"excluded; its operators are {', '.join(given)}. {'; '.join(left)}"
        )
    return found, list(dict.fromkeys(left))  # a layer may multiply several times


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _kernel(graph: Graph, node: NodeProto, layer: str) -> Kernel:
    weight = graph.constants[node.input[1]]
    if not np.isfinite(weight).all():
        raise StageError(f"layer {layer!r} has weights that are NaN or infinite; retrain or reload the model")
    return Kernel(node, layer, weight, 0 if node.op_type == "Conv" or attributes(node).get("transB", 0) else 1)


def _obstacle(graph: Graph, node: NodeProto) -> str | None:
    weight = graph.constants.get(node.input[1])
    if weight is None:
        return "it multiplies two tensors of which none is constant"
    if weight.dtype != np.float32 or weight.size == 0:
        return f"its weight is {weight.dtype} of shape {weight.shape}"
    if node.op_type == "MatMul" and weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions"
    bias = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(0)
    if bias is None or bias.ndim != 1:
        return "its bias is no constant vector"
    given = attributes(node)
    plain = given.get("alpha", 1) == given.get("beta", 1) == 1 and not given.get("transA", 0)
    return None if node.op_type != "Gemm" or plain else "it does more than multiply and add"


def _layer(graph: Graph, node: NodeProto) -> str:
    """Return the name of a layer: that of its weight, where the file still has it, or of the module that ran."""
    module, _, parameter = node.input[0 if node.op_type == "Gather" else 1].rpartition(".")
    if parameter == "weight" and module:
        return str(module)
    scopes = [scope for scope in graph.scopes.get(node.output[0], [])[:-1] if scope]
    return scopes[-1] if scopes else str(node.name)


def _scopes(node: NodeProto) -> list[str]:
    """Return the names of the modules that were running, the innermost last, and the node's own."""
    found = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
    return [str(name) for name in ast.literal_eval(found[0])] if found else []
