"""The report as one self-contained HTML page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jinja2
from rarefy_schemas import Histogram, Measurement, Report, StageReport

from rarefy import yaml
from rarefy.report import numbers, plots
from rarefy.report.sentences import speed_in_words, verdict
from rarefy.report.summary import final, find, speed_at, summarize

OWN = {
    "parameters", "nonzero", "sparsity", "compression_rate", "nonzero_rate", "index_space_saving", "flops",
    "flops_rate", "peak_memory", "bytes", "bytes_rate",
}  # fmt: skip
"""Measurements that have a place in the table of steps."""


@dataclass(frozen=True)
class Layer:
    """One layer of the original and what is left of it."""

    name: str
    before: int
    after: int

    @property
    def kept(self) -> float | None:
        """Return the share that is left; None for a layer that the original does not have."""
        return self.after / self.before if self.before else None


def render(report: Report) -> str:
    """Return the page; the same report gives the same text."""
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            stages=(report.baseline, *report.steps),
            summary=summarize(report),
            verdict=verdict(report),
            batches=[speed.batch for speed in summarize(report).speeds],
            layers=layers(report),
            size_plot=_size_plot(report),
            histograms=_histograms(report),
            recipe=yaml.dump(report.recipe),
        )
    )


def environment() -> jinja2.Environment:
    """Return the templates with the filters that write numbers; everything put in is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("rarefy.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("count", "size", "times", "percent", "milliseconds", "duration", "metric", "change", "ratio"):
        templates.filters[name] = getattr(numbers, name)
    templates.filters["speed_in_words"] = speed_in_words
    templates.globals.update(find=find, speed_at=speed_at, others=_others)
    return templates


def layers(report: Report) -> list[Layer]:
    """Return the layers of the original, then those that are new; parts count for the layer they replace."""
    before, after = report.baseline.layer_parameters, dict(final(report).layer_parameters)
    found = []
    for name, size in before.items():
        parts = [part for part in after if part == name or part.startswith(f"{name}.")]
        found.append(Layer(name, size, sum(after.pop(part) for part in parts)))
    return found + [Layer(name, 0, size) for name, size in after.items()]


def _others(stage: StageReport, metric: str) -> list[Measurement]:
    """Return what plugins measured beyond core's figures."""
    timed = ("latency@", "speed_up_rate@")
    return [m for m in stage.measurements if m.name not in OWN | {metric} and not m.name.startswith(timed)]


def _size_plot(report: Report) -> str:
    """Return the plot, empty when a stage lacks a figure or there is only one."""
    stages = (report.baseline, *report.steps)
    points = [(stage.value("bytes"), stage.value(report.metric)) for stage in stages]
    known = [(x, y) for x, y in points if x and y is not None and math.isfinite(y)]
    if len(known) < max(2, len(points)):
        return ""
    told = "; ".join(
        f"{number} {stage.name}: {numbers.size(x)}, {numbers.metric(report.metric, y)}"
        for number, (stage, (x, y)) in enumerate(zip(stages, known, strict=True))
    )
    sizes, values = zip(*known, strict=True)
    return plots.size_against_metric(sizes, values, report.metric, f"File size and {report.metric} by stage. {told}")


def _histograms(report: Report) -> list[dict[str, Any]]:
    """Return a plot per layer that has a histogram in the original or in the end."""
    before = {h.layer: h for h in report.baseline.histograms}
    after = {h.layer: h for h in final(report).histograms} if report.steps else {}
    found = [_histogram(name, h, [after.pop(part) for part in _parts(name, after)]) for name, h in before.items()]
    found += [_histogram(name, None, [h]) for name, h in after.items()]
    for number, entry in enumerate(found):
        title = f"Distribution of the weights of {entry['name']}. {entry['caption']}"
        entry["svg"] = plots.weight_histogram(entry["before"], entry["after"], f"weights-{number}", title)
    return found


def _parts(name: str, after: dict[str, Histogram]) -> list[str]:
    return [part for part in after if part == name or part.startswith(f"{name}.")]


def _histogram(name: str, before: Histogram | None, after: list[Histogram]) -> dict[str, Any]:
    had = numbers.count(sum(before.counts)) if before else "none"
    has = numbers.count(sum(sum(h.counts) for h in after)) if after else "none drawn"
    caption = f"{had} to {has}" if after != [before] else had
    return {"name": name, "before": before, "after": after, "caption": f"{caption} non-zero weights"}
