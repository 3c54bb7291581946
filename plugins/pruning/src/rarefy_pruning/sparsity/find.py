"""Which structures of a model can be trained to die, and why others cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rarefy.dependencies import Dependencies, Group, find_dependencies
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.task import Task
from rarefy.weights import LayerWeight
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy_pruning.sparsity.constants import zeroed
from rarefy_pruning.sparsity.members import Layers, groups_of, layer_name, refusal
from rarefy_pruning.sparsity.slices import Slices, Structures


@dataclass(frozen=True)
class Found:
    """What there is to regularise."""

    structures: tuple[Structures, ...] = ()
    groups: tuple[str, ...] = ()
    """Names of the dependency groups whose units may be cut in the end."""
    dependencies: Dependencies = field(default_factory=lambda: Dependencies((), ()))
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why a target layer has no structure of its own, by its name."""

    def of(self, layer: str) -> list[Structures]:
        """Return the structures of a layer: its own, or the units of which it makes a part."""
        made = (f"{layer}.weight", (0,))
        return [s for s in self.structures if s.name == layer or made in [(p.tensor, p.dims) for p in s.slices]]


def units(model: nn.Module, weights: list[LayerWeight], task: Task) -> Found:
    """Find the units of the groups whose producing layers are all targets."""
    dependencies, targets = _dependencies(model, task), {weight.name for weight in weights}
    parameters, layers = dict(model.named_parameters()), Layers.of(model)

    def refused(group: Group) -> str | None:
        producers = [m for m in group.members if layers.produces(m) and parameters[m.tensor].any()]
        others = [layer_name(m) for m in producers if layer_name(m) not in targets]
        return f"its outputs are coupled with those of {others[0]!r}, which is no target" if others else refusal(group)

    groups, reasons = _eligible(dependencies, weights, 0, refused)
    structures = []
    for group in groups:
        members = [m for m in group.members if m.tensor in parameters]
        structures.append(Structures(group.name, tuple(Slices(m.tensor, (m.dim,), m.indices) for m in members)))
    return Found(tuple(structures), tuple(group.name for group in groups), dependencies, reasons)


def filters(model: nn.Module, weights: list[LayerWeight], task: Task) -> Found:
    """Find the filters of each layer with their biases; a unit of several filters, as in a group, counts as one."""
    return _per_layer(model, weights, task, 0)


def channels(model: nn.Module, weights: list[LayerWeight], task: Task) -> Found:
    """Find the weights that read each channel, of each layer; behind a flatten they are several columns."""
    return _per_layer(model, weights, task, 1)


def shapes(model: nn.Module, weights: list[LayerWeight], task: Task) -> Found:
    """Find the columns of the unrolled weights (Lebedev & Lempitsky 2016)."""
    structures = []
    for weight in weights:
        columns = torch.arange(weight.parameter[0].numel())[:, None]
        dims = tuple(range(1, weight.parameter.dim()))
        structures.append(Structures(weight.name, (Slices(f"{weight.name}.weight", dims, columns),)))
    return Found(tuple(structures))


def depths(model: nn.Module, weights: list[LayerWeight], task: Task) -> Found:
    """Find the layers that a shortcut passes: without their weights the outputs still depend on the inputs.

    The groups are those of what they read.
    """
    structures, reasons, passed = [], {}, []
    inputs, without = move(task.example_inputs(2), device_of(model)), copy.deepcopy(model)
    for weight in weights:
        parameter = without.get_parameter(f"{weight.name}.weight")
        with zeroed(parameter):
            bypassed = _depends(without, inputs)
        if bypassed:
            everything = torch.arange(len(parameter))[None]
            structures.append(Structures(weight.name, (Slices(f"{weight.name}.weight", (0,), everything),)))
            passed.append(weight)
        else:
            reasons[weight.name] = "no shortcut passes it: without it the outputs do not depend on the inputs"
    dependencies = _dependencies(model, task)
    groups, _ = _eligible(dependencies, passed, 1, refusal)
    return Found(tuple(structures), tuple(group.name for group in groups), dependencies, reasons)


FINDERS: Mapping[str, Callable[[nn.Module, list[LayerWeight], Task], Found]] = {
    "unit": units, "filter": filters, "channel": channels, "shape": shapes, "depth": depths,
}  # fmt: skip


def _dependencies(model: nn.Module, task: Task) -> Dependencies:
    return find_dependencies(model, move(task.example_inputs(2), device_of(model)))


def _eligible(
    dependencies: Dependencies, weights: list[LayerWeight], dim: int, refused: Callable[[Group], str | None]
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups of dimension `dim` of the weights that are not refused, and the reasons for the layers left."""
    found: dict[str, Group] = {}
    reasons = {}
    for weight in weights:
        groups = groups_of(dependencies, f"{weight.name}.weight", dim)
        told = {group.name: refused(group) for group in groups}
        found.update({group.name: group for group in groups if told[group.name] is None})
        if None not in told.values():
            reasons[weight.name] = next(iter(told.values()), "its channels are tied to nothing that can be cut")
    return list(found.values()), reasons


def _per_layer(model: nn.Module, weights: list[LayerWeight], task: Task, dim: int) -> Found:
    dependencies = _dependencies(model, task)
    groups, reasons = _eligible(dependencies, weights, dim, refusal)
    structures = []
    for weight in weights:
        mine = {(f"{weight.name}.weight", dim)} | ({(f"{weight.name}.bias", 0)} if dim == 0 else set())
        for group in groups:
            members = [m for m in group.members if (m.tensor, m.dim) in mine]
            parts = tuple(Slices(m.tensor, (m.dim,), m.indices) for m in members)
            structures += [Structures(weight.name, parts)] if parts else []
    return Found(tuple(structures), tuple(group.name for group in groups), dependencies, reasons)


def _depends(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Tell whether the outputs change when the samples of `inputs` change places."""
    flipped = tuple(leaf.flip(0) if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs)
    with evaluation(model):
        outputs = [tree_leaves(model(*given)) for given in (inputs, flipped)]
    pairs = zip(*outputs, strict=True)
    return any(isinstance(a, torch.Tensor) and not torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)
