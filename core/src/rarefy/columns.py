"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def columns(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return lines of aligned columns under a header, numbers to the right."""
    table = [[_text(cell) for cell in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in table) for i in range(len(header))]
    widths = [max(len(row[i]) for row in ([*header], *table)) for i in range(len(header))]
    lines = []
    for row in ([*header], ["-" * width for width in widths], *table):
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


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
