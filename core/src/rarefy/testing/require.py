"""How a broken rule is told."""

from __future__ import annotations

from typing import Any


def require(kept: Any, rule: str, mend: str) -> None:
    """Raise `AssertionError` with the rule and the way to mend it, unless it is `kept`."""
    __tracebackhide__ = True
    if not kept:
        raise AssertionError(f"{rule}.\n  To mend it: {mend}.")
