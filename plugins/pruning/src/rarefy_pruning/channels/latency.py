"""Budgets of measured time: predicted from the times of single layers, verified on the whole model."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rarefy.dependencies import Dependencies, Removal, cut
from rarefy.dependencies.cutting import removed
from rarefy.measure import Latency, latency
from rarefy.measure.latency import using_threads
from rarefy.measure.mode import device_of, evaluation, move
from torch import nn

from rarefy_pruning.channels.config import Target
from rarefy_pruning.channels.timetable import LayerTimes, table_for
from rarefy_pruning.channels.widths import resized

CORRECTIONS = 3
TOLERANCE = 0.02
"""How far from the target, as a share of it, a measured time may lie."""
_RUNS = 25
_BETWEEN = ""
_LEAST = 0.01


@dataclass(frozen=True)
class _Tried:
    """A removal with its predicted share and measured time."""

    removal: Removal
    predicted: float
    measured: Latency


class LatencyLeft:
    """The share of a model's time that a removal leaves: one, less what its layers save by a table of times.

    What layers without an entry (activations, additions, kinds not known) save is left out; `settle` measures it.
    """

    def __init__(
        self, model: nn.Module, found: Dependencies, target: Target, inputs: tuple[Any, ...], round_to: int
    ) -> None:
        self.model, self.found, self.target = model, found, target
        self.inputs = move(inputs, device_of(model))
        self.table = table_for(model, target.table, target.threads)
        layers = _timed(model, found)
        seen = _inputs(model, self.inputs, layers)
        self.shares = _shares(model, self.inputs, {name: layers[name] for name in seen}, target.threads)
        self.times = {
            name: LayerTimes(layers[name], inputs, self.table, round_to, target.threads)
            for name, inputs in seen.items()
        }
        self.weights = _weight_names(model, layers)

    def __call__(self, removal: Removal) -> float:
        """Return the predicted share."""
        gone = {key: len(positions) for key, positions in removed(self.found, removal).items()}
        left = 1.0
        for name, times in self.times.items():
            sizes = [size - gone.get((self.weights[name], dim), 0) for dim, size in enumerate(times.full[:2])]
            left -= self.shares[name] * (1 - times.ratio(sizes))
        return left

    def settle(self, choose: Callable[[float], Removal]) -> tuple[Removal, list[str]]:
        """Return a removal whose time was measured on the whole model, and what is to be said of it.

        `choose` returns a removal for a share to be reached by prediction. What the measurement shows corrects that
        share, at most three times.
        """
        tried: list[_Tried] = []
        goal = self.target.share
        for _ in range(1 + CORRECTIONS):
            removal = choose(goal)
            if tried and _same(removal, tried[-1].removal):
                break
            tried.append(self._try(removal))
            share = tried[-1].measured.ratio
            if abs(share / self.target.share - 1) <= TOLERANCE:
                break
            # what was saved falls short of the prediction, or exceeds it, by about the same factor next time
            factor = max((1 - share) / max(1 - tried[-1].predicted, 1e-6), 1e-6)
            goal = min(max(1 - (1 - self.target.share) / factor, _LEAST), 1 - 1e-6)
        self.table.save()
        best = self._best(tried)
        return best.removal, self._notes(best, len(tried) - 1)

    def _try(self, removal: Removal) -> _Tried:
        compact = cut(self.model, self.found, removal)
        measured = latency(self.model, compact, self.inputs, threads=self.target.threads)
        return _Tried(removal, self(removal), measured)

    def _best(self, tried: Sequence[_Tried]) -> _Tried:
        """Return the slowest of those that meet the target, as less was cut; the fastest when none does."""
        met = [one for one in tried if self._meets(one)]
        return max(met or [min(tried, key=_share)], key=_share)

    def _meets(self, tried: _Tried) -> bool:
        return tried.measured.ratio <= self.target.share * (1 + TOLERANCE)

    def _notes(self, best: _Tried, corrections: int) -> list[str]:
        measured, batch = best.measured, self.target.batch_size
        found = [
            f"Latency at batch size {batch}: {best.predicted:.1%} predicted from single layers, {measured.ratio:.1%} "
            f"measured on the whole model ({measured.original_ms:.3g} ms to {measured.ms[1]:.3g} ms, "
            f"{corrections} correction{'s' if corrections != 1 else ''})."
        ]
        if not self._meets(best):
            found.append(
                f"The target of {self.target.share:.1%} of the latency is missed: {measured.ratio:.1%} is left; lower "
                "`least`, target more layers, or ask for less."
            )
        if measured.low > 1 or measured.ratio <= 1:
            return found
        return [*found, f"Pruning made the model slower: it takes {measured.ratio:.2f} times as long as before."]


def _share(tried: _Tried) -> float:
    return tried.measured.ratio


def _same(one: Removal, other: Removal) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _timed(model: nn.Module, found: Dependencies) -> dict[str, nn.Module]:
    """Return the layers whose weight is cut by some group and that can be built in other widths."""
    cut_tensors = {member.tensor for group in found.groups for member in group.members}
    names = {id(tensor): name for name, tensor in model.named_parameters()}

    def timed(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        known = isinstance(weight, nn.Parameter) and names.get(id(weight)) in cut_tensors
        return known and resized(module, tuple(weight.shape)) is not None

    return {name: module for name, module in model.named_modules() if timed(module)}


def _weight_names(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    return {name: names[id(layer.weight)] for name, layer in layers.items()}


def _inputs(model: nn.Module, inputs: tuple[Any, ...], layers: dict[str, nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Return the tensors that each layer is called with; layers that are not called have none."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor):
                seen[name].append(args[0].detach().clone())

        return before

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluation(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        model(*inputs)
    return dict(seen)


def _shares(
    model: nn.Module, inputs: tuple[Any, ...], layers: dict[str, nn.Module], threads: int | None
) -> dict[str, float]:
    """Return the share of the model's time that is spent in each layer.

    A forward pass is cut into the stretches inside and between the layers, and the shortest of several runs is taken
    of each: a stretch is short enough to escape whatever else the machine does, a forward pass may not be.
    """
    device = device_of(model)
    marks: list[tuple[str, float]] = []

    def mark(owner: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            marks.append((owner, time.perf_counter()))

        return note

    least: dict[tuple[int, str], float] = {}
    with ExitStack() as stack, torch.inference_mode(), using_threads(threads):
        stack.enter_context(evaluation(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(mark(name)).remove)
            stack.callback(layer.register_forward_hook(mark(_BETWEEN)).remove)
        for _ in range(_RUNS):
            marks.clear()
            mark(_BETWEEN)()
            model(*inputs)
            mark(_BETWEEN)()
            for i, ((owner, began), (_, ended)) in enumerate(pairwise(marks)):
                least[i, owner] = min(least.get((i, owner), math.inf), ended - began)
    found = dict.fromkeys([*layers, _BETWEEN], 0.0)
    for (_, owner), seconds in least.items():
        found[owner] += seconds
    return {name: found[name] / sum(found.values()) for name in layers}
