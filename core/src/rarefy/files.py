"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from rarefy.errors import StageError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "you may not write there; choose another folder or change its permissions",
    errno.EPERM: "you may not write there; choose another folder or change its permissions",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ENOTDIR: "a part of its path is a file, not a folder; choose another path",
    errno.EISDIR: "a folder of that name stands there; choose another name",
    errno.ENOTEMPTY: "a folder of that name stands there; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the device reports an error; choose another disk",
}


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move that file to `path` when the block ends well.

    The file and its folder are flushed to disk first, so a killed process or a lost power supply leaves the old file
    or the new one. When the block raises, nothing is left behind. Raises `StageError` when the system refuses to
    write (full disk, read-only folder, ...). The temporary file has the same ending as `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:80]}-{secrets.token_hex(6)}.part{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            _flush(path.parent)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        raise StageError(f"cannot write {path}: {_ADVICE[error.errno]} ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder; raise `StageError` when that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(f"cannot create the folder {path}: {error.strerror}; choose another with --output") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
