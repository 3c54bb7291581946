"""Everything that is measured after a stage of a run."""

from __future__ import annotations

from collections.abc import Iterator

from rarefy_schemas import Evaluate, Measurement
from torch import nn

from rarefy.measure.latency import latency
from rarefy.measure.memory import peak_memory
from rarefy.measure.rates import compression_rate, index_space_saving
from rarefy.measure.size import nonzero, parameters
from rarefy.measure.work import flops
from rarefy.task import Task


def measure(model: nn.Module, original: nn.Module, task: Task, config: Evaluate) -> list[Measurement]:
    """Return the task's metric on the validation split, and size, work, memory and time beside the original."""
    better = "higher" if task.higher_is_better else "lower"
    metric = Measurement(name=task.metric, value=task.score(model, "validation"), better=better)
    timings = (m for batch in config.batch_sizes for m in _time(model, original, task, config, batch))
    return [metric, *_size(model, original), *_work(model, original, task), *timings]


def _size(model: nn.Module, original: nn.Module) -> Iterator[Measurement]:
    a, a_star = parameters(original), parameters(model)
    b, b_star = nonzero(original), nonzero(model)
    yield Measurement(name="parameters", value=a_star, unit="parameters", better="lower")
    yield Measurement(name="nonzero", value=b_star, unit="parameters", better="lower")
    if a_star:
        yield Measurement(name="sparsity", value=1 - b_star / a_star, unit="share")
        yield Measurement(name="compression_rate", value=compression_rate(a, a_star), unit="x", better="higher")
        yield Measurement(name="index_space_saving", value=index_space_saving(a, a_star), unit="share", better="higher")
    if b_star:
        yield Measurement(name="nonzero_rate", value=compression_rate(b, b_star), unit="x", better="higher")


def _work(model: nn.Module, original: nn.Module, task: Task) -> Iterator[Measurement]:
    inputs = task.example_inputs(1)
    before, after = flops(original, inputs), flops(model, inputs)
    yield Measurement(name="flops", value=after, unit="FLOPs", better="lower")
    if after:
        yield Measurement(name="flops_rate", value=before / after, unit="x", better="higher")
    yield Measurement(name="peak_memory", value=peak_memory(model, inputs), unit="bytes", better="lower")


def _time(model: nn.Module, original: nn.Module, task: Task, config: Evaluate, batch: int) -> Iterator[Measurement]:
    found = latency(original, model, task.example_inputs(batch), config.rounds, config.threads)
    low, middle, high = found.ms
    yield Measurement(name=f"latency@{batch}", value=middle, unit="ms", better="lower", low=low, high=high)
    yield Measurement(
        name=f"speed_up_rate@{batch}",
        value=found.speed_up,
        unit="x",
        better="higher",
        low=found.low,
        high=found.high,
    )
