"""The headline figures of a run."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy_schemas import Measurement, Report, StageReport


@dataclass(frozen=True)
class Summary:
    """What the original was and what came out; None where nothing was measured."""

    split: str
    """Split that `before` and `after` are from."""
    before: float | None
    after: float | None
    higher_is_better: bool
    original_bytes: float | None
    """Bytes of the original's float32 file."""
    bytes: float | None
    """Bytes of the smallest exported file, of the last checkpoint when nothing is exported."""
    rate: float | None
    speeds: tuple[Speed, ...]

    @property
    def change(self) -> float | None:
        """Return after - before."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Speed:
    """Speed-up rate s / s* at one batch size, with its quartiles."""

    batch: int
    rate: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Tell whether the middle half of the timings lies on one side of 1."""
        return self.low > 1 or self.high < 1


def summarize(report: Report) -> Summary:
    """Return the headline figures of a report, finished or not."""
    last = final(report)
    original_bytes, size, rate = _sizes(report, last)
    test = {m.name: m for m in report.test}
    before, after = test.get("original"), test.get("compressed")
    if not test:
        before, after = find(report.baseline, report.metric), find(last, report.metric)
    return Summary(
        split="test" if test else "validation",
        before=before.value if before else None,
        after=after.value if after else None,
        higher_is_better=after is None or after.better != "lower",
        original_bytes=original_bytes,
        bytes=size,
        rate=rate,
        speeds=speeds(last),
    )


def final(report: Report) -> StageReport:
    """Return the last stage that is finished."""
    return report.steps[-1] if report.steps else report.baseline


def find(stage: StageReport, name: str) -> Measurement | None:
    """Return the measurement called `name`."""
    return next((m for m in stage.measurements if m.name == name), None)


def speeds(stage: StageReport) -> tuple[Speed, ...]:
    """Return the speed-up rates of a stage by batch size."""
    found = []
    for m in stage.measurements:
        name, _, batch = m.name.partition("@")
        if name == "speed_up_rate" and batch.isdecimal():
            low, high = (m.value if quartile is None else quartile for quartile in (m.low, m.high))
            found.append(Speed(int(batch), m.value, low, high))
    return tuple(sorted(found, key=lambda speed: speed.batch))


def speed_at(stage: StageReport, batch: int) -> Speed | None:
    """Return the speed-up rate of a stage at one batch size."""
    return next((speed for speed in speeds(stage) if speed.batch == batch), None)


def _sizes(report: Report, last: StageReport) -> tuple[float | None, float | None, float | None]:
    if report.exports:
        smallest = min(report.exports, key=lambda export: export.bytes)
        return smallest.bytes * smallest.rate, smallest.bytes, smallest.rate
    size, rate = last.value("bytes"), last.value("bytes_rate")
    return (size * rate if size is not None and rate is not None else None), size, rate
