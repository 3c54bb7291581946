"""Progress bars on a terminal; nothing elsewhere, where log lines say what is going on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import rich.progress

T = TypeVar("T")

_quiet = False
_displays: list[rich.progress.Progress] = []
"""One entry, the same one, per open bar."""


def set_quiet(quiet: bool) -> None:
    """Show no progress from now on, or show it again."""
    global _quiet
    _quiet = quiet


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how many are done; `total` is needed where `iterable` has no length."""
    length = total if total is not None else getattr(iterable, "__len__", lambda: None)()
    with Progress(description, length) as progress:
        for item in iterable:
            yield item
            progress.advance()


class Progress:
    """A bar for as long as the `with` block lasts; one opened inside another is drawn below it."""

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description, self.total = description, total
        self.display: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        if not _quiet and sys.stderr.isatty():
            self.display = _displays[-1] if _displays else _display()
            self.display.start()
            self.task = self.display.add_task(self.description, total=self.total)
            _displays.append(self.display)
        return self

    def advance(self, steps: float = 1) -> None:
        """Count `steps` more as done."""
        if self.display is not None:
            self.display.advance(self.task, steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.display is not None:
            self.display.remove_task(self.task)
            _displays.pop()
            if not _displays:
                self.display.stop()


def _display() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
