"""Numbers as people read them."""

from __future__ import annotations

import math
import re

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


def count(value: float | None) -> str:
    """Return `431,080`, or `25.6 M` from ten millions on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value < 1e7 else short(value)


def short(value: float) -> str:
    """Return a count as `5.82 M`, three digits and a unit."""
    shown, unit = _scaled(value, ("", "K", "M", "G", "T", "P"))
    return f"{shown}{SPACE}{unit}" if unit else shown


def size(value: float | None) -> str:
    """Return bytes as `42.3 KB`, of 1000 bytes each."""
    if value is None:
        return ""
    shown, unit = _scaled(value, ("B", "KB", "MB", "GB", "TB", "PB"))
    return f"{shown}{SPACE}{unit}"


def tick(value: float) -> str:
    """Return bytes as `50 KB`, without decimals that say nothing."""
    return re.sub(r"\.0+(?=\D)", "", size(value))


def times(value: float | None) -> str:
    """Return a ratio as `0.97×`, `1.84×` or `41.3×`."""
    return "" if value is None else f"{ratio(value)}{TIMES}"


def ratio(value: float) -> str:
    """Return three significant digits; two decimals around 1."""
    value = float(f"{value:.3g}")
    return f"{value:.2f}" if 0.1 <= value < 10 else significant(value)


def percent(value: float | None) -> str:
    """Return a share as `92.7 %`."""
    return "" if value is None else f"{100 * value:.1f}{SPACE}%"


def milliseconds(value: float | None) -> str:
    """Return `1.84 ms`."""
    return "" if value is None else f"{significant(value)}{SPACE}ms"


def duration(seconds: float) -> str:
    """Return `12 s` or `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def metric(name: str, value: float | None) -> str:
    """Return a value of the task's metric; an accuracy as a percentage."""
    if value is None:
        return ""
    return f"{100 * value:.2f}{SPACE}%" if is_share(name) else f"{value:.4g}"


def change(name: str, value: float) -> str:
    """Return how much the metric changed, with its sign; an accuracy in percentage points."""
    sign = MINUS if value < 0 else "+"
    return f"{sign}{abs(100 * value):.2f}{SPACE}points" if is_share(name) else f"{sign}{abs(value):.4g}"


def is_share(name: str) -> bool:
    """Tell whether a metric called `name` is a share that is read as a percentage."""
    return "accuracy" in name.lower()


def significant(value: float) -> str:
    """Return three significant digits without an exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    value = float(f"{value:.3g}")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def _scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    """Return three significant digits of a number and the unit of 1000 to a power that suits it."""
    rounded = float(f"{value:.3g}")
    power = min(len(units) - 1, math.floor(math.log10(rounded) / 3)) if rounded >= 1 else 0
    return (significant(rounded / 1000**power) if power else f"{value:,.0f}"), units[power]
