"""How commands print: a table for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """Add `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")(command)


def print_json(data: Any) -> None:
    """Print `data` as JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_rows(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns; numbers to the right."""
    table = [[_text(cell) for cell in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in table) for i in range(len(header))]
    widths = [max(len(row[i]) for row in ([*header], *table)) for i in range(len(header))]
    for row in ([*header], ["-" * width for width in widths], *table):
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "") or 0)
    except ValueError:
        return False
    return True
