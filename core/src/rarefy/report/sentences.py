"""Findings in plain sentences."""

from __future__ import annotations

from rarefy_schemas import Report, StageReport

from rarefy.report import numbers
from rarefy.report.summary import Speed, speeds, summarize

NOTABLE = 1.05
"""Ratio from which on a difference in time is told."""
SHOWN = 1.005
"""Ratio from which on a smaller file does not read "1.00x"."""


def words(step: StageReport, previous: StageReport | None) -> list[str]:
    """Return what a reader of the step's figures should not miss; nothing for the baseline."""
    if previous is None:
        return []
    found = [*_slower(step, previous), *_size(step, previous)]
    if _ratio(step, previous, "flops", above=1):
        found.append(f"FLOPs grew from {_pair(step, previous, 'flops')}.")
    if _ratio(step, previous, "peak_memory", above=NOTABLE):
        found.append(f"Peak memory grew {numbers.times(_ratio(step, previous, 'peak_memory'))}.")
    if step.skipped:
        layers = len(step.skipped) + len(step.layers)
        found.append(f"Layers left alone: {len(step.skipped)} of {layers}; the reasons are with the step.")
    return found


def verdict(report: Report) -> str:
    """Return the outcome of a run in one sentence."""
    found = summarize(report)
    parts = []
    if found.rate is not None and found.original_bytes is not None:
        smaller = size_in_words(found.rate)
        parts.append(f"{smaller} on disk ({numbers.size(found.original_bytes)} to {numbers.size(found.bytes)})")
    if found.before is not None and found.after is not None:
        before, after = (numbers.metric(report.metric, value) for value in (found.before, found.after))
        parts.append(f"{report.metric} {before} to {after} on the {found.split} split")
    parts += [f"{speed_in_words(speed)} at batch size {speed.batch}" for speed in found.speeds]
    text = ", ".join(parts) or "nothing measured yet"
    return f"{text[0].upper()}{text[1:]}."


def size_in_words(rate: float) -> str:
    """Return `41.3× smaller` or `1.20× larger`."""
    return f"{numbers.times(rate)} smaller" if rate >= 1 else f"{numbers.times(1 / rate)} larger"


def speed_in_words(speed: Speed) -> str:
    """Return `1.84× faster`, `1.21× slower` or `no clear change in speed`."""
    if not speed.clear or 1 / NOTABLE < speed.rate < NOTABLE:
        return "no clear change in speed"
    return f"{numbers.times(speed.rate)} faster" if speed.rate > 1 else f"{numbers.times(1 / speed.rate)} slower"


def _slower(step: StageReport, previous: StageReport) -> list[str]:
    before = {speed.batch: speed for speed in speeds(previous)}
    found = []
    for now in speeds(step):
        then = before.get(now.batch)
        if then is not None and then.rate > NOTABLE * now.rate and then.low > now.high:
            found.append(
                f"This step made the model {numbers.times(then.rate / now.rate)} slower at batch size {now.batch}."
            )
    return found


def _size(step: StageReport, previous: StageReport) -> list[str]:
    grown = _ratio(step, previous, "parameters", above=1)
    if grown:
        return [f"Parameters grew from {_pair(step, previous, 'parameters')}."]
    if _ratio(step, previous, "parameters") != 1 or (step.technique or "").startswith(("prepare/", "recovery/")):
        return []
    smaller = _ratio(previous, step, "bytes", above=SHOWN)
    file = f"the file is {numbers.times(smaller)} smaller" if smaller else "the file did not shrink"
    if _ratio(previous, step, "nonzero", above=1):
        sparsity = numbers.percent(step.value("sparsity"))
        return [
            f"{sparsity} of the parameters are exact zeros and {file}. Zeros still take part in every multiplication "
            "of a dense layer, so they are not counted as speed."
        ]
    return [f"The number of parameters did not fall; {file}."]


def _ratio(step: StageReport, previous: StageReport, name: str, *, above: float = 0) -> float | None:
    """Return a figure of `step` divided by that of `previous`, when there are both and it is larger than `above`."""
    now, then = step.value(name), previous.value(name)
    return now / then if now is not None and then and now / then > above else None


def _pair(step: StageReport, previous: StageReport, name: str) -> str:
    return f"{numbers.count(previous.value(name))} to {numbers.count(step.value(name))}"
