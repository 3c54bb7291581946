from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from rarefy.errors import StageError
from rarefy.files import atomic_write


def fail(path: Path, error: BaseException) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_finished_block_leaves_exactly_the_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.bin") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".bin"
        temporary.write_bytes(b"new")
        assert not (tmp_path / "a.bin").exists()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.bin": b"new"}


def test_a_failed_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "a", KeyboardInterrupt())
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize(
    ("number", "word"),
    [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "permissions"), (errno.EDQUOT, "quota")],
)
def test_a_refusing_system_is_reported_with_advice_and_leaves_nothing(tmp_path: Path, number: int, word: str) -> None:
    with pytest.raises(StageError, match=word):
        fail(tmp_path / "a", OSError(number, os.strerror(number)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_found_at_the_last_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StageError, match="disk is full"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("all of it")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_block_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        fail(tmp_path / "a", TimeoutError(errno.ETIMEDOUT, "slow"))


def test_a_missing_folder_and_a_folder_in_the_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="create it first"), atomic_write(tmp_path / "no" / "a") as temporary:
        temporary.write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StageError, match="a folder of that name"), atomic_write(tmp_path / "folder") as temporary:
        temporary.write_text("x")


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
