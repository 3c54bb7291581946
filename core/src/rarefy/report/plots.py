"""Plots as SVG that takes its colours and fonts from the page, so that dark mode and print work."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from rarefy_schemas import Histogram

from rarefy.report import numbers

# colours that stand for variables of the style sheet
INK, MUTED, GRID, ACCENT, ON_ACCENT, BEFORE = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", ON_ACCENT: "on-accent", BEFORE: "before",
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 10, "axes.edgecolor": MUTED, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "grid.color": GRID, "grid.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True, "text.parse_math": False,
}  # fmt: skip


def size_against_metric(sizes: Sequence[float], values: Sequence[float], metric: str, title: str) -> str:
    """Draw bytes (logarithmic) against the metric, the stages numbered and joined in their order."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(sizes, values, color=BEFORE, linewidth=1.2, zorder=2)
        axes.scatter(sizes, values, s=230, color=ACCENT, zorder=3)
        for number, (x, y) in enumerate(zip(sizes, values, strict=True)):
            axes.text(x, y, str(number), ha="center", va="center_baseline", color=ON_ACCENT, fontsize=9, zorder=4)
        axes.set_xscale("log")
        axes.margins(0.12, 0.2)
        if len(set(sizes)) == 1:
            axes.set_xlim(sizes[0] / 2, sizes[0] * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=_subs(sizes)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: numbers.tick(x)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if numbers.is_share(metric):
            ticks = axes.yaxis.get_major_locator().tick_values(*axes.get_ylim())
            axes.yaxis.set_major_formatter(PercentFormatter(1, _decimals(ticks), f"{numbers.SPACE}%"))
        axes.set_xlabel("file size")
        return _svg(figure, "size", title)


def weight_histogram(before: Histogram | None, after: Sequence[Histogram], name: str, title: str) -> str:
    """Draw the weights of one layer, or of the layers that replace it, over those of the original."""
    with matplotlib.rc_context(STYLE | {"font.size": 9, "axes.grid": False, "axes.spines.left": False}):
        figure = Figure(figsize=(3, 1.5), layout="constrained")
        axes = figure.subplots()
        if before is not None:
            axes.stairs(_density(before), before.edges, fill=True, color=BEFORE, alpha=0.45)
        for histogram in after:
            axes.stairs(_density(histogram), histogram.edges, color=ACCENT, linewidth=1.4)
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, name, title)


def _subs(sizes: Sequence[float]) -> tuple[float, ...]:
    decades = math.log10(max(sizes) / min(sizes))
    return (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)


def _decimals(shares: Iterable[float]) -> int:
    """Return the fewest decimals that percentages can be written with as they are."""
    percentages = [100 * share for share in shares]
    return next((n for n in range(6) if all(abs(round(x, n) - x) < 1e-9 for x in percentages)), 6)


def _density(histogram: Histogram) -> list[float]:
    """Return the counts relative to the fullest bin, so that a pruned layer can be seen beside its original."""
    return [n / max(1, *histogram.counts) for n in histogram.counts]


def _svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an `<svg>` element with a title, ids of its own, and variables for colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r" font-family: [^;\"]+;", "", body)
    body = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib)[^"]*"', "", body)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{name}-title">{escape(title)}</title>{body.strip()}'
    )
