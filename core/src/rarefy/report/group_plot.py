"""A plot of dependency groups as a file of its own: what cutting each saves, and what it does to the loss."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rarefy.dependencies.overview import LEVELS, GroupRow
from rarefy.errors import StageError
from rarefy.files import atomic_write
from rarefy.report.plots import STYLE

FORMATS = (".svg", ".png", ".html")
_INK, _MUTED, _GRID, _SAVED = "#1a1d21", "#5d6670", "#d9dde2", "#1f6feb"
_LEVELS = ("#f2c28c", "#e08a3c", "#a8500f")
_COLOURS = {
    "text.color": _INK, "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "xtick.color": _MUTED,
    "ytick.color": _INK, "grid.color": _GRID, "axes.grid.axis": "x",
}  # fmt: skip


def draw_groups(rows: Sequence[GroupRow], path: Path, title: str) -> None:
    """Write bars per group as SVG, PNG or HTML, by the ending of `path`; raise `StageError` for another ending."""
    kind = check_ending(path)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE | _COLOURS):
        figure = _figure(rows, title)
        figure.savefig(buffer, format="png" if kind == ".png" else "svg", dpi=150, facecolor="white")
    data = buffer.getvalue()
    with atomic_write(path) as temporary:
        temporary.write_bytes(_page(data.decode(), title) if kind == ".html" else data)


def check_ending(path: Path) -> str:
    """Return the ending of a file to draw to; raise `StageError` when that is no format."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise StageError(f"cannot draw {path.name!r}; give it one of the endings {', '.join(FORMATS)}")
    return kind


def _figure(rows: Sequence[GroupRow], title: str) -> Figure:
    measured = any(row.increases for row in rows)
    figure = Figure(figsize=(11 if measured else 7.5, 1.2 + 0.26 * max(4, len(rows))), layout="constrained")
    axes = figure.subplots(1, 2 if measured else 1, sharey=True, squeeze=False)[0]
    figure.suptitle(title)
    _saved(axes[0], rows)
    if measured:
        _increases(axes[1], rows)
    return figure


def _saved(axes: Axes, rows: Sequence[GroupRow]) -> None:
    places = range(len(rows))
    axes.barh(places, [row.flops_saved or 0 for row in rows], color=_SAVED, height=0.7)
    axes.set_yticks(places, [f"{row.name} ({row.units})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("FLOPs saved when half of the units go")
    for place, row in enumerate(rows):
        if row.pinned is not None:
            reason = row.pinned if len(row.pinned) <= 70 else f"{row.pinned[:69]}…"
            axes.annotate(f"pinned: {reason}", (0, place), (3, 0), textcoords="offset points", va="center", fontsize=7)


def _increases(axes: Axes, rows: Sequence[GroupRow]) -> None:
    height = 0.8 / len(LEVELS)
    for i, (level, colour) in enumerate(zip(LEVELS, _LEVELS, strict=True)):
        known = [(place, row.increases[i]) for place, row in enumerate(rows) if row.increases]
        where = [place + (i - (len(LEVELS) - 1) / 2) * height for place, _ in known]
        axes.barh(where, [value for _, value in known], height=height, color=colour, label=f"{level:.0%} masked")
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("increase of the loss")


def _page(svg: str, title: str) -> bytes:
    body = svg[svg.index("<svg") :]
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    return f"{head}<body>\n{body}</body>\n</html>\n".encode()
