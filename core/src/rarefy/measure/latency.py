"""How long a forward pass takes beside the original's."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rarefy.measure.mode import device_of, evaluation, move
from rarefy.measure.rates import speed_up_rate

WARM_UP = 3
SHORTEST = 0.002
"""Seconds that one timing should last at least; shorter forward passes are timed several at once."""
SHORT = 0.0005
"""Seconds that a timing should last whose minimum is taken: long for the clock, short for the scheduler."""
MOST_REPEATS = 50


@dataclass(frozen=True)
class Latency:
    """Time of a model beside its original, from pairs of timings in one process."""

    speed_up: float
    """Median of s / s* over the pairs; above 1 the model is faster than the original."""
    low: float
    """Lower quartile of s / s*."""
    high: float
    """Upper quartile of s / s*."""
    ms: tuple[float, float, float]
    """Lower quartile, median and upper quartile of the model's forward pass, in milliseconds."""
    original_ms: float
    """Median of the original's forward pass, in milliseconds."""

    @property
    def ratio(self) -> float:
        """Return the time as a multiple of the original's."""
        return 1 / self.speed_up


def latency(
    original: nn.Module, model: nn.Module, inputs: tuple[Any, ...], rounds: int = 20, threads: int | None = None
) -> Latency:
    """Time both models in turn, `rounds` times each, so that what else the machine does falls on both alike.

    Who goes first alternates. Training modes and torch's number of threads are restored.
    """
    with evaluation(original, model), using_threads(threads), torch.inference_mode(), _no_collection():
        run = [_Run(original, inputs), _Run(model, inputs)]
        repeats = min(MOST_REPEATS, max(1, round(SHORTEST / min(each.warm_up() for each in run))))
        times: list[tuple[float, float]] = []
        for turn in range(rounds):
            first, second = turn % 2, 1 - turn % 2
            taken = {which: run[which].time(repeats) for which in (first, second)}
            times.append((taken[0], taken[1]))
    low, middle, high = _quartiles([speed_up_rate(s, s_star) for s, s_star in times])
    ms_low, ms, ms_high = _quartiles([1000 * s_star for _, s_star in times])
    return Latency(middle, low, high, (ms_low, ms, ms_high), 1000 * statistics.median(s for s, _ in times))


def fastest(models: Sequence[nn.Module], inputs: tuple[Any, ...], rounds: int, threads: int | None) -> list[float]:
    """Return the shortest time of a forward pass of each model, in seconds, timed in turn `rounds` times each.

    The shortest is the one that other work of the machine disturbed least: for layers that take well under a
    millisecond, where a quartile would tell more of the scheduler.
    """
    with evaluation(*models), using_threads(threads), torch.inference_mode(), _no_collection():
        run = [_Run(model, inputs) for model in models]
        repeats = [min(MOST_REPEATS, max(1, round(SHORT / each.warm_up()))) for each in run]
        times = [[each.time(count) for each, count in zip(run, repeats, strict=True)] for _ in range(rounds)]
    return [min(each) for each in zip(*times, strict=True)]


class _Run:
    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.model, self.device = model, device_of(model)
        self.inputs = move(inputs, self.device)

    def warm_up(self) -> float:
        """Return the shortest of a few forward passes, in seconds."""
        # what a model caches in its first pass must not be an inference tensor, or it could not be trained any more
        with torch.inference_mode(False), torch.no_grad():
            self.model(*self.inputs)
        return min(self.time(1) for _ in range(WARM_UP))

    def time(self, repeats: int) -> float:
        """Return the seconds of one forward pass."""
        self._wait()
        began = time.perf_counter()
        for _ in range(repeats):
            self.model(*self.inputs)
        self._wait()
        return max((time.perf_counter() - began) / repeats, 1e-9)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextlib.contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Give torch a number of threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
