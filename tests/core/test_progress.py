from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Iterator

import pytest
from rarefy.progress import Progress, set_quiet, track

REFRESH = 0.25
"""Seconds after which a bar is drawn anew for certain."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TERM", "xterm")
    yield
    set_quiet(False)


def shown(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_track_yields_every_item_and_shows_how_many_are_done() -> None:
    items = []
    with terminal() as stream:
        for item in track("abc", "letters [of] a word"):
            items.append(item)
            time.sleep(REFRESH if item == "c" else 0)
    assert items == ["a", "b", "c"]
    assert "letters [of] a word" in shown(stream)
    assert "2/3" in shown(stream)


def test_a_generator_can_say_how_many_items_it_has() -> None:
    with terminal() as stream:
        assert list(track((i for i in range(2)), "items", total=2)) == [0, 1]
    assert "0/2" in shown(stream)


def test_bars_inside_bars_share_the_screen() -> None:
    with terminal() as stream, Progress("steps", 2) as outer:
        outer.advance()
        for _ in track(range(1), "batches"):
            time.sleep(REFRESH)
    assert re.search(r"steps .* 1/2 .*\n.*batches .* 0/1", shown(stream))


def test_a_loop_left_early_or_by_an_error_closes_its_bar() -> None:
    def fails() -> None:
        for _ in track(range(3), "failed"):
            raise KeyError

    with terminal():
        for _ in track(range(3), "left early"):
            break
        with pytest.raises(KeyError):
            fails()
    with terminal() as stream:
        assert list(track(range(1), "next")) == [0]
    assert "next" in shown(stream)
    assert "left early" not in shown(stream)
    assert "failed" not in shown(stream)


def test_nothing_is_shown_when_quiet() -> None:
    set_quiet(True)
    with terminal() as stream:
        assert list(track([1, 2], "hidden")) == [1, 2]
    assert stream.getvalue() == ""


def test_nothing_is_shown_where_there_is_no_terminal() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        assert list(track([1, 2], "hidden")) == [1, 2]
    assert stream.getvalue() == ""
