"""Which layers stay in float32, as many as the time or the bytes of a file allow."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx
from rarefy.errors import StageError
from rarefy.exporters.onnx import OnnxModel
from rarefy.measure import latency
from rarefy.progress import track
from rarefy.task import Task

from rarefy_quantization.execution.activations import watched
from rarefy_quantization.execution.comparison import Comparison

if TYPE_CHECKING:
    from rarefy_quantization.execution.config import FloatTarget, OnnxInt8Format
    from rarefy_quantization.execution.graph import Graph, Kernel

Build = Callable[[Sequence[str]], onnx.ModelProto]
"""Returns the file whose layers of the given patterns stay in float32."""


def layers_in_float(
    float32: bytes,
    graph: Graph,
    kernels: Sequence[Kernel],
    build: Build,
    task: Task,
    config: OnnxInt8Format,
    target: FloatTarget,
) -> tuple[list[str], str]:
    """Return the layers that stay in float32 under a target, and words about them.

    `graph` holds the float32 file before anything was quantized. Each layer is quantized alone, and what that does to
    the outputs is taken to add up. Layers are sorted by it over what they cost in float32, multiplications or bytes,
    and by bisection as many from the front are kept as the file that they are in has room for: it is written and
    measured each time. Raises `StageError` when even the file with every layer on integers has none.
    """
    costs = _costs(graph, kernels, target, task)
    names = list(costs)
    effects = _effects(float32, build, names, target, task)
    order = sorted(names, key=lambda name: effects[name] / costs[name], reverse=True)
    budget = _Budget(float32, target, config, task)
    taken = {0: budget.share(build([]))}
    if taken[0] > target.most:
        raise StageError(
            f"with every layer on integers the file takes {taken[0]:.0%} of the float32 file's {target.measure}, and "
            f"`target` allows {target.most:.0%}; allow more"
        )
    low, high = 0, len(order)  # a file without any layer on integers is none of this format
    while high - low > 1:
        middle = (low + high) // 2
        taken[middle] = budget.share(build(patterns(order[:middle])))
        low, high = (middle, high) if taken[middle] <= target.most else (low, middle)
    kept = order[:low]
    named = ", ".join(kept) or "none"
    return kept, (
        f"layers in float32 by `target`, the most needed first: {named}; {len(order) - low} run on integers, and the "
        f"file takes {taken[low]:.0%} of the float32 file's {target.measure}"
    )


def patterns(layers: Sequence[str]) -> list[str]:
    """Return patterns that match these layers only."""
    return [glob.escape(layer) for layer in layers]


def _costs(graph: Graph, kernels: Sequence[Kernel], target: FloatTarget, task: Task) -> dict[str, float]:
    """Return what each layer costs in float32: its multiplications for a sample, or the bytes of its weight."""
    if target.measure == "bytes":
        sizes = [kernel.weight.nbytes for kernel in kernels]
    else:
        outputs = [kernel.node.output[0] for kernel in kernels]
        values = OnnxModel(watched(graph, outputs))(*task.example_inputs())[-len(outputs) :]
        sizes = [value.numel() * kernel.rows().shape[1] for value, kernel in zip(values, kernels, strict=True)]
    costs: dict[str, float] = {}
    for kernel, size in zip(kernels, sizes, strict=True):
        costs[kernel.layer] = costs.get(kernel.layer, 0) + max(size, 1)
    return costs


def _effects(
    float32: bytes, build: Build, names: Sequence[str], target: FloatTarget, task: Task
) -> Mapping[str, float]:
    """Return the squared error of the outputs when one layer alone runs on integers, as a share of their variance."""
    original = OnnxModel(float32)
    batches = list(task.calibration(batches=target.batches))
    expected = [original(*batch) for batch in batches]

    def effect(name: str) -> float:
        alone = OnnxModel(build(patterns([other for other in names if other != name])).SerializeToString())
        comparison = Comparison()
        for batch, outputs in zip(batches, expected, strict=True):
            comparison.add(outputs, alone(*batch))
        return comparison.error() ** 2

    return {name: effect(name) for name in track(names, "layer by layer")}


class _Budget:
    """Measures files beside the float32 file."""

    def __init__(self, float32: bytes, target: FloatTarget, config: OnnxInt8Format, task: Task) -> None:
        self._target, self._rounds = target, config.rounds
        self._bytes = len(float32)
        self._inputs: Any = task.example_inputs(config.batch_size)
        self._original = OnnxModel(float32)

    def share(self, model: onnx.ModelProto) -> float:
        """Return time or bytes of a file as a share of the float32 file's."""
        file = model.SerializeToString()
        if self._target.measure == "bytes":
            return len(file) / self._bytes
        return latency(self._original, OnnxModel(file), self._inputs, self._rounds).ratio
