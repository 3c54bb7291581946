"""The grids of activations, from what passes through the graph on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from rarefy.errors import StageError
from rarefy.exporters.onnx import OnnxModel
from rarefy.progress import track

from rarefy_quantization.execution.config import OnnxInt8Format
from rarefy_quantization.execution.graph import Graph
from rarefy_quantization.grids import Grid
from rarefy_quantization.ranges import fit_grid

SAMPLE = 1 << 17
"""About how many values of a tensor are kept, evenly spaced over all batches, beside its least and greatest."""


def activation_grids(
    graph: Graph, tensors: list[str], batches: Iterable[tuple[Any, ...]], config: OnnxInt8Format
) -> dict[str, Grid]:
    """Return an affine grid of 256 values for each of `tensors`, by the option `range`.

    Raises `StageError` when there are no batches or a value is NaN or infinite.
    """
    file = OnnxModel(watched(graph, tensors))
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in tensors}
    for batch in track(batches, "calibrating", config.batches):
        for name, values in zip(tensors, file(*batch)[-len(tensors) :], strict=True):
            kept[name].append(_sample(name, values.flatten(), SAMPLE // config.batches))
    if not any(kept.values()):
        raise StageError(
            "the task's calibration gives no batches, and the format onnx-int8 needs the ranges of the activations; "
            "give the task training data"
        )
    return {name: fit_grid(torch.cat(values).unsqueeze(0), 8, config) for name, values in kept.items()}


def _sample(name: str, values: torch.Tensor, most: int) -> torch.Tensor:
    """Return the least, the greatest and some other values."""
    ends = torch.stack(torch.aminmax(values))
    if not torch.isfinite(ends).all():
        raise StageError(f"the tensor {name!r} has values that are NaN or infinite on the calibration data")
    return torch.cat([ends, values[:: -(-len(values) // max(1, most))]])


def watched(graph: Graph, tensors: list[str]) -> bytes:
    """Return the model with copies of `tensors` as its last outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.finished())
    for number, name in enumerate(tensors):
        model.graph.node.append(helper.make_node("Identity", [name], [f"watched_{number}"]))
        model.graph.output.append(helper.make_tensor_value_info(f"watched_{number}", TensorProto.FLOAT, None))
    return bytes(model.SerializeToString())
