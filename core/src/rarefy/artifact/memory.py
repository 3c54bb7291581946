"""Encoded tensors that need not be encoded again: a run writes most of them several times."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from rarefy_schemas import Coding

Encoded = tuple[Coding, bytes]
_ENTRY = 256
"""Bytes that an entry takes beside what was encoded."""


class Memory:
    """The codings found last, as many as fit into `most` bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._found: OrderedDict[Hashable, Encoded] = OrderedDict()

    def get(self, key: Hashable) -> Encoded | None:
        """Return what is remembered by that key."""
        if key in self._found:
            self._found.move_to_end(key)
        return self._found.get(key)

    def put(self, key: Hashable, found: Encoded) -> None:
        """Remember a coding that is not there yet, and forget those that were not asked for the longest."""
        self._found[key] = found
        self._bytes += len(found[1]) + _ENTRY
        while self._bytes > self._most:
            _, (_, part) = self._found.popitem(last=False)
            self._bytes -= len(part) + _ENTRY
