"""The range coder's words as bytes, little-endian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import constriction
import numpy as np

from rarefy.errors import ArtifactError

_WORD = np.dtype("<u4")


def encoder() -> Any:
    """Return a new encoder."""
    return constriction.stream.queue.RangeEncoder()


def finished(encoder: Any) -> bytes:
    """Return what an encoder has written."""
    return bytes(encoder.get_compressed().astype(_WORD, copy=False).tobytes())


@contextmanager
def decoding(data: bytes | bytearray, what: str) -> Iterator[Any]:
    """Give a decoder of words; raise `ArtifactError` when no encoder writes them, or when some are left over."""
    if len(data) % _WORD.itemsize:
        raise ArtifactError(f"the {what} are not whole words")
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, _WORD).astype(np.uint32))
    try:
        yield decoder
        whole = decoder.maybe_exhausted()
    except AssertionError as error:  # what constriction raises
        raise ArtifactError(f"the {what} are not sound: {error}") from error
    if not whole:
        raise ArtifactError(f"there are more {what} than elements")
