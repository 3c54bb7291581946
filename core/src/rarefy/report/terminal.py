"""The report in the terminal."""

from __future__ import annotations

from rarefy_schemas import Report, StageReport

from rarefy.report import numbers
from rarefy.report.sentences import verdict
from rarefy.report.summary import speeds, summarize

WIDTH = 110
"""Columns where there is no terminal to ask."""


def console(report: Report) -> None:
    """Print the outcome, a table of the steps and the notes on stdout."""
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = WIDTH
    batches = [speed.batch for speed in summarize(report).speeds]
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", overflow="fold")
    headers = [report.metric, "parameters", "non-zero", "FLOPs", "bytes", "smaller", *(f"speed @{b}" for b in batches)]
    for header in headers:
        table.add_column(Text(header), justify="right", overflow="fold")
    for stage in (report.baseline, *report.steps):
        table.add_row(*(Text(cell) for cell in _row(report, stage, batches)))
    out.print(Text(report.name, style="bold"))
    out.print(Text(verdict(report)))
    out.print(table)
    for text in _notes(report):
        out.print(Text(text))


def _row(report: Report, stage: StageReport, batches: list[int]) -> list[str]:
    rates = {speed.batch: speed.rate for speed in speeds(stage)}
    return [
        stage.name,
        numbers.metric(report.metric, stage.value(report.metric)),
        numbers.count(stage.value("parameters")),
        numbers.count(stage.value("nonzero")),
        numbers.count(stage.value("flops")),
        numbers.size(stage.value("bytes")),
        numbers.times(stage.value("bytes_rate")),
        *(numbers.times(rates.get(batch)) for batch in batches),
    ]


def _notes(report: Report) -> list[str]:
    notes = [f"{stage.name}: {note}" for stage in report.steps for note in stage.notes]
    for budget in report.budgets:
        outcome = "met" if budget.met else "MISSED"
        notes.append(f"budget {budget.name}: {budget.value:g} of at most {budget.limit:g}, {outcome}")
    return [*notes, *report.notes]
