"""Several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rarefy_schemas import Report

from rarefy.report.summary import Summary, final, summarize


def compare_rows(reports: Sequence[Report]) -> tuple[list[str], list[list[Any]]]:
    """Return a header and one row per run; a figure that a run lacks is None."""
    found = [summarize(report) for report in reports]
    batches = batch_sizes(found)
    header = ["run", "metric", "original", "compressed", "change", "bytes", "times smaller", "parameters"]
    header += ["compression rate", "FLOPs rate", *(f"speed-up @{batch}" for batch in batches), "budgets"]
    return header, [_row(report, summary, batches) for report, summary in zip(reports, found, strict=True)]


def compare_html(reports: Sequence[Report]) -> str:
    """Return the comparison as one self-contained page."""
    from rarefy.report.page import environment

    found = [summarize(report) for report in reports]
    return (
        environment()
        .get_template("compare.html")
        .render(
            runs=list(zip(reports, found, [final(report) for report in reports], strict=True)),
            batches=batch_sizes(found),
        )
    )


def batch_sizes(found: Sequence[Summary]) -> list[int]:
    """Return the batch sizes at which any of the runs was timed."""
    return sorted({speed.batch for summary in found for speed in summary.speeds})


def _row(report: Report, summary: Summary, batches: Sequence[int]) -> list[Any]:
    last = final(report)
    rates = {speed.batch: speed.rate for speed in summary.speeds}
    parameters = last.value("parameters")
    return [
        report.name,
        report.metric,
        summary.before,
        summary.after,
        summary.change,
        None if summary.bytes is None else round(summary.bytes),
        summary.rate,
        None if parameters is None else round(parameters),
        last.value("compression_rate"),
        last.value("flops_rate"),
        *(rates.get(batch) for batch in batches),
        _budgets(report),
    ]


def _budgets(report: Report) -> str:
    missed = [budget.name for budget in report.budgets if not budget.met]
    return f"missed {', '.join(missed)}" if missed else "met" if report.budgets else ""
