"""Tables that rows are looked up in, as 8-bit integers with a scale per row."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
from onnx import NodeProto, TensorProto, helper

from rarefy_quantization.execution.codes import row_codes
from rarefy_quantization.execution.graph import Graph, attributes

SMALLEST = 4096
"""Entries from which on a table is worth two more operators."""


def quantize_embeddings_(graph: Graph, exclude: tuple[str, ...]) -> int:
    """Look rows up among integers and multiply them with their scales; return the number of tables."""
    tables = {node.input[0] for node in graph.nodes if _is_lookup(graph, node, exclude)}
    for table in sorted(tables):
        codes = row_codes(graph.constants[table])
        graph.constant(f"{table}/q", codes.codes)
        graph.constant(f"{table}/s", codes.scales[:, None])
    graph.nodes = [new for node in graph.nodes for new in (_lookup(node) if _reads(node, tables) else [node])]
    return len(tables)


def _reads(node: NodeProto, tables: set[str]) -> bool:
    return node.op_type == "Gather" and node.input[0] in tables


def _is_lookup(graph: Graph, node: NodeProto, exclude: tuple[str, ...]) -> bool:
    """Tell whether a node looks up rows of a large constant matrix that is not used in any other way."""
    if node.op_type != "Gather" or attributes(node).get("axis", 0) != 0:
        return False
    table = graph.constants.get(node.input[0])
    if table is None or table.ndim != 2 or table.dtype != np.float32 or table.size < SMALLEST:
        return False
    alone = all(user.op_type == "Gather" for user in graph.users(node.input[0]))
    layer = node.input[0].rpartition(".")[0]
    return alone and bool(np.isfinite(table).all()) and not any(fnmatchcase(layer, pattern) for pattern in exclude)


def _lookup(node: NodeProto) -> list[NodeProto]:
    table, places = node.input
    name = node.output[0]
    return [
        helper.make_node("Gather", [f"{table}/q", places], [f"{name}/q"]),
        helper.make_node("Gather", [f"{table}/s", places], [f"{name}/s"]),
        helper.make_node("Cast", [f"{name}/q"], [f"{name}/c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}/c", f"{name}/s"], [name]),
    ]
