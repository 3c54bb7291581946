"""Times of single layers by width, beside the time at full width; measured once each."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rarefy.environment import environment
from rarefy.errors import StageError
from rarefy.files import atomic_write
from rarefy.measure.latency import fastest
from rarefy.measure.mode import device_of
from rarefy.registry import get
from torch import nn

from rarefy_pruning.channels.widths import Resized, resized

log = logging.getLogger("rarefy")

ROUNDS = 9
MOST_NODES = 8
_MEMORY: dict[str, float] = {}
"""Everything measured by this process."""


class TimeTable:
    """Ratios of times by what was timed and where, in memory, and in a file when one is named."""

    def __init__(self, path: Path | None, machine: str) -> None:
        self.path, self.machine = path, machine
        self.known = _MEMORY if path is None else _read(path)

    def ratio(self, key: str, measure: Callable[[], float]) -> float:
        """Return what is known under a key, or measure it."""
        key = f"{self.machine}; {key}"
        if key not in self.known:
            self.known[key] = _MEMORY[key] if key in _MEMORY else measure()
            _MEMORY[key] = self.known[key]
        return self.known[key]

    def save(self) -> None:
        """Write the file, when there is one; raise `StageError` when that is not possible."""
        if self.path is not None:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")


def machine(device: torch.device, threads: int) -> str:
    """Return what times depend on besides the layer."""
    known = environment(get())
    name = known["processor"] if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, {known['cores']} cores, {threads} threads, torch {known['torch']}"


def _read(path: Path) -> dict[str, float]:
    """Return the content of a file; empty when there is none, and with a warning when it is broken."""
    if not path.parent.is_dir():
        raise StageError(f"the folder of the table of times {str(path)!r} does not exist; create it first")
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not all(isinstance(x, float) and 0 < x < math.inf for x in found.values()):
            raise ValueError("it holds something else than positive numbers by name")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("the table of times %s cannot be used and is measured anew: %s", path, error)
        return {}
    return found


class LayerTimes:
    """The time of one layer beside that at full width, by the sizes of its weight."""

    def __init__(
        self, layer: nn.Module, inputs: Sequence[torch.Tensor], table: TimeTable, round_to: int, threads: int | None
    ) -> None:
        self.layer, self.inputs, self.table, self.threads = layer, inputs, table, threads
        self.full = tuple(layer.weight.shape)  # type: ignore[union-attr, arg-type]
        self.nodes = [nodes(size, round_to) for size in self.full[:2]]
        self.known = {self.full[:2]: 1.0}

    def ratio(self, sizes: Sequence[int]) -> float:
        """Return the time at some sizes of the first two dimensions, interpolated linearly along each."""
        brackets = [_bracket(ladder, size) for ladder, size in zip(self.nodes, sizes, strict=False)]
        return sum(
            math.prod(weight for _, weight in corner) * self._measured(tuple(size for size, _ in corner))
            for corner in itertools.product(*brackets)
        )

    def _measured(self, sizes: tuple[int, ...]) -> float:
        if sizes not in self.known:
            self.known[sizes] = self._measure(sizes)
        return self.known[sizes]

    def _measure(self, sizes: tuple[int, ...]) -> float:
        full, other = resized(self.layer, self.full), resized(self.layer, (*sizes, *self.full[2:]))
        if full is None or other is None:
            return 1.0
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in self.inputs)

        def measure() -> float:
            alone = [_Alone(each, self.inputs) for each in (other, full)]
            ours, before = fastest(alone, (), ROUNDS, self.threads)
            return ours / before

        return self.table.ratio(f"{other.layer} beside {full.layer} on {shapes}", measure)


class _Alone(nn.Module):
    """A layer with its inputs."""

    def __init__(self, made: Resized, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.layer = made.layer
        self.inputs = [x.narrow(made.axis, 0, made.width).clone() for x in inputs]

    def forward(self) -> None:
        """Run the layer on each input."""
        for x in self.inputs:
            self.layer(x)


def nodes(size: int, round_to: int) -> list[int]:
    """Return the widths to measure: multiples of `round_to`, so far apart that there are about eight, and 1."""
    unit = round_to if size >= 4 * round_to else 1
    spacing = unit * math.ceil(size / (MOST_NODES * unit))
    return sorted({1, *range(spacing, size, spacing), size})


def _bracket(ladder: Sequence[int], size: int) -> list[tuple[int, float]]:
    """Return the nodes around a size with their weights."""
    low = max(node for node in ladder if node <= size)
    high = min(node for node in ladder if node >= size)
    if low == high:
        return [(low, 1.0)]
    weight = (size - low) / (high - low)
    return [(low, 1 - weight), (high, weight)]


def threads_of(number: int | None) -> int:
    """Return how many threads a measurement takes."""
    return number or torch.get_num_threads()


def table_for(model: nn.Module, path: str | None, threads: int | None) -> TimeTable:
    """Return the table for the machine that `model` is on."""
    return TimeTable(None if path is None else Path(path), machine(device_of(model), threads_of(threads)))
