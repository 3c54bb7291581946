"""A model on torch's own 8-bit kernels, layer by layer, where they are measured to be faster.

Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
(arXiv 1712.05877), equation 7, for one layer at a time: what passes between layers is float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from rarefy.calibration import stream_together, without_fast_path
from rarefy.errors import StageError
from rarefy.measure.latency import fastest
from rarefy.measure.mode import device_of, evaluation
from rarefy.measure.rates import speed_up_rate
from rarefy.technique import refuse_not_finite, replace_
from torch import nn

from rarefy_quantization.execution.codes import RowCodes, row_codes
from rarefy_quantization.execution.comparison import Comparison, floats, rate_in_words
from rarefy_quantization.execution.layers import IntegerConv2d, IntegerLayer, IntegerLinear
from rarefy_quantization.execution.operators import Affine, Geometry, Kind, trial
from rarefy_quantization.grids import Grid

KINDS: dict[type[nn.Module], Kind] = {nn.Linear: "linear", nn.Conv2d: "conv2d"}
"""Layers with integer kernels; these very classes, as a subclass may compute something else."""
WORTHWHILE = 1.05
"""Speed-up from which integers are worth their rounding; less comes and goes with the machine."""


Measure = Callable[[Sequence[nn.Module], tuple[Any, ...], int, int | None], list[float]]
"""Returns the time of a forward pass of each model, as `rarefy.measure.latency.fastest` does."""


@dataclass(frozen=True)
class LayerVerdict:
    """What became of one layer, and why."""

    name: str
    replaced: bool
    """Whether it was faster on integers; see `KernelReport.replaced` for whether the model is."""
    reason: str
    found: bool = False
    """Whether its weight consisted of the integers already."""
    speed_up: float | None = None
    """Its time in float32 over that on integers; None where it was not timed."""
    error: float | None = None
    """How far its outputs moved: the root of the mean squared difference, as a share of their standard deviation."""


@dataclass(frozen=True)
class KernelReport:
    """What became of a model, measured on the inputs it was given."""

    replaced: bool
    """Whether the model that was returned has layers on integers."""
    reason: str
    layers: tuple[LayerVerdict, ...]
    speed_up: float | None = None
    """Time of the model in float32 over that with the replaced layers; None where no layer was replaced."""
    error: float | None = None
    """How far its outputs moved, as in `LayerVerdict`."""

    def __str__(self) -> str:
        """Return the verdicts in lines, the model's first."""
        parts = [("model", self), *((layer.name or "the layer", layer) for layer in self.layers)]
        return "\n".join(f"{name}: {'int8' if part.replaced else 'float32'}: {part.reason}" for name, part in parts)


def integer_kernels(
    model: nn.Module,
    inputs: tuple[Any, ...],
    calibration: Iterable[tuple[Any, ...]] | None = None,
    *,
    exclude: Sequence[str] = (),
    max_error: float = 0.5,
    rounds: int = 20,
    measure: Measure = fastest,
) -> tuple[nn.Module, KernelReport]:
    """Return a copy of a float32 model on the CPU with layers on 8-bit integer kernels, and what was measured.

    `inputs` are the positional arguments of a forward pass of the size that will be run: a layer is replaced when it is
    faster on what it sees of them, by a twentieth, going by the shortest of `rounds` timings of either form, taken in
    turn with torch's present number of threads. Then the same is asked of the whole model, and a copy in float32 is
    returned when the answer is no, or when the outputs move by more than `max_error` (the root of the mean squared
    difference over the standard deviation of the outputs).

    Linear layers round their activations at each call. Convolutions round them, and their outputs, to the ranges seen
    on `calibration`, batches of positional arguments such as `task.calibration()`, which also tell the error; without
    it they are seen on `inputs`, which should then be data. Weights that lie on a grid per output keep their integers,
    others are rounded to 8 bits per output. Layers that match a shell pattern of `exclude` stay in float32.

    The copy is in evaluation mode, without gradients, and made for this machine: keep the model it was made from.
    Copies, pickles and state dicts of it hold plain tensors and are packed anew where they are read. torch's
    transformer layers no longer compute in one fused step, which leaves values, not zeros, where a mask hides padding.

    Raises `StageError` for a model that is not on the CPU, weights or calibrated values that are NaN or infinite,
    patterns that match no layer, batches that are no tuples, empty calibration, and numbers out of range.
    """
    _refuse_wrong(model, max_error, rounds)
    layers = {name: module for name, module in model.named_modules() if type(module) in KINDS}
    _refuse_unused(exclude, layers)
    batches = [inputs] if calibration is None else list(calibration)
    _refuse_no_tuples(inputs, batches)
    changed = copy.deepcopy(model).eval().requires_grad_(False)
    verdicts = []
    for name, layer in layers.items():
        obstacle = "it is excluded" if _matches(name, exclude) else _obstacle(layer)
        if obstacle is not None:
            verdicts.append(LayerVerdict(name, False, obstacle))
            continue
        verdict, new = _tried(model, name, layer, inputs, batches, rounds, measure)
        verdicts.append(verdict)
        if new is not None:
            changed = _with(changed, name, new)
    if not any(verdict.replaced for verdict in verdicts):
        return changed, KernelReport(False, _why_none(verdicts), tuple(verdicts))
    _without_fused_steps_(changed)
    report = _judged(model, changed, inputs, batches, tuple(verdicts), max_error, rounds, measure)
    return changed if report.replaced else copy.deepcopy(model).eval().requires_grad_(False), report


def _tried(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    batches: list[tuple[Any, ...]],
    rounds: int,
    measure: Measure,
) -> tuple[LayerVerdict, IntegerLayer | None]:
    """Return the verdict on a layer, and the one that takes its place if any."""
    passed = [calls[0] for calls in stream_together([model], [inputs], name)]
    if not passed:
        return LayerVerdict(name, False, "the forward pass never calls it"), None
    given, wanted = zip(*passed, strict=True)
    if any(values.dtype != torch.float32 for values in given):
        return LayerVerdict(name, False, f"it is given {given[0].dtype}"), None
    rows = row_codes(layer.weight.detach().flatten(1).numpy())
    if isinstance(layer, nn.Conv2d):
        new: IntegerLayer = _conv2d(layer, rows, *_grids(model, name, batches))
    else:
        new = IntegerLinear(*_tensors(layer, rows))
    new.eval()
    comparison = Comparison()
    with torch.no_grad():
        comparison.add(list(wanted), [new(values) for values in given])
    error, speed_up = comparison.error(), _speed_up(measure, _Calls(layer), _Calls(new), given, rounds)
    faster = speed_up >= WORTHWHILE
    origin = "its weight consists of them" if rows.found else "its weight is rounded to 8 bits per output"
    reason = f"{_words(speed_up)}, error {error:.2%}, {origin}"
    return LayerVerdict(name, faster, reason, rows.found, speed_up, error), new if faster else None


def _judged(
    model: nn.Module,
    changed: nn.Module,
    inputs: tuple[Any, ...],
    batches: list[tuple[Any, ...]],
    layers: tuple[LayerVerdict, ...],
    max_error: float,
    rounds: int,
    measure: Measure,
) -> KernelReport:
    comparison = Comparison()
    with evaluation(model), torch.no_grad(), without_fast_path():
        for batch in batches:
            comparison.add(floats(model(*batch)), floats(changed(*batch)))
    error, speed_up = comparison.error(), _speed_up(measure, model, changed, inputs, rounds)
    number = sum(layer.replaced for layer in layers)
    reason = f"{_words(speed_up)} in {number} of {len(layers)} layers, error {error:.2%}"
    if not error <= max_error:
        reason += f" of the spread of the outputs, and `max_error` is {max_error:.2%}"
    return KernelReport(speed_up >= WORTHWHILE and error <= max_error, reason, layers, speed_up, error)


class _Calls(nn.Module):
    """A layer, called with one input after the other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [self.layer(values) for values in inputs]


def _tensors(layer: nn.Module, rows: RowCodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return codes shaped like the weight, scales and bias."""
    codes = torch.from_numpy(rows.codes).reshape(layer.weight.shape)
    return codes, torch.from_numpy(rows.scales), layer.bias


def _conv2d(layer: nn.Conv2d, rows: RowCodes, given: Affine, out: Affine) -> IntegerConv2d:
    pairs = (layer.stride, layer.padding, layer.dilation)
    stride, padding, dilation = ((int(height), int(width)) for height, width in pairs)
    return IntegerConv2d(*_tensors(layer, rows), Geometry(stride, padding, dilation, layer.groups), given, out)


def _grids(model: nn.Module, name: str, batches: list[tuple[Any, ...]]) -> tuple[Affine, Affine]:
    """Return the grids between the least and the greatest of what a layer is given and of what it gives."""
    ends = [[0.0, 0.0], [0.0, 0.0]]
    for ((given, out),) in stream_together([model], batches, name):
        for found, values in zip(ends, (given, out), strict=True):
            found[:] = min(found[0], values.min().item()), max(found[1], values.max().item())
            if not torch.isfinite(values).all():
                raise StageError(f"layer {name!r} meets values that are NaN or infinite; check the model and the data")
    return _affine(*ends[0], trial("conv2d").bits), _affine(*ends[1], 8)


def _affine(least: float, most: float, bits: int) -> Affine:
    grid = Grid.between(torch.tensor([[least]]), torch.tensor([[most]]), bits, symmetric=False)
    return Affine(grid.step.item(), int(-grid.low.item()), bits)


def _obstacle(layer: nn.Module) -> str | None:
    """Return why a layer cannot run on the kernels."""
    if layer.weight.dtype != torch.float32 or layer.weight.numel() == 0:
        return f"its weight is {layer.weight.dtype} of shape {tuple(layer.weight.shape)}"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which would be lost"
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"its padding is {layer.padding} of mode {layer.padding_mode!r}, and the kernel adds numbers of zeros"
    return trial(KINDS[type(layer)]).obstacle


def _with(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    replace_(model, model.get_submodule(name), new)
    return model


def _without_fused_steps_(model: nn.Module) -> None:
    """Let torch's transformer layers call their layers instead of handing the weights to a fused float kernel."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _why_none(verdicts: Sequence[LayerVerdict]) -> str:
    if not verdicts:
        return f"it has no {' or '.join(kind.__name__ for kind in KINDS)}"
    reasons = {verdict.reason for verdict in verdicts}
    return "no layer runs faster on integers" + (f": {reasons.pop()}" if len(reasons) == 1 else "")


def _speed_up(measure: Measure, one: nn.Module, other: nn.Module, inputs: tuple[Any, ...], rounds: int) -> float:
    before, after = measure([one, other], inputs, rounds, None)
    return speed_up_rate(before, after)


def _words(speed_up: float) -> str:
    little = 1 <= speed_up < WORTHWHILE
    return f"{rate_in_words(speed_up)} on integers{', too little to round for' if little else ''}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unused(exclude: Sequence[str], names: Iterable[str]) -> None:
    names = sorted(names)
    if unused := [pattern for pattern in exclude if not any(fnmatchcase(name, pattern) for name in names)]:
        raise StageError(
            f"`exclude` has {', '.join(map(repr, unused))}, which matches no layer; the layers are "
            f"{', '.join(names) or 'none'}"
        )


def _refuse_no_tuples(inputs: object, batches: Sequence[object]) -> None:
    if not batches:
        raise StageError("`calibration` gives no batches; give at least one, or leave it out")
    for batch in (inputs, *batches):
        if not isinstance(batch, tuple):
            raise StageError(
                f"`inputs` and each batch of `calibration` are the positional arguments of a forward pass as a tuple, "
                f"such as `(x,)`, not {type(batch).__name__}"
            )


def _refuse_wrong(model: nn.Module, max_error: float, rounds: int) -> None:
    if device_of(model).type != "cpu":
        raise StageError(f"the model is on {device_of(model)}, and the kernels run on the CPU; move it with `.cpu()`")
    if not max_error > 0 or math.isnan(max_error):
        raise StageError(f"`max_error` is {max_error}; give a positive number")
    if rounds < 3:
        raise StageError(f"`rounds` is {rounds}; give at least 3")
    for name, module in model.named_modules():
        if type(module) in KINDS and module.weight is not None:
            refuse_not_finite(name, module.weight)
