"""What a pickle would import, read from its opcodes without running it."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def imports(path: Path) -> list[str]:
    """Return the dotted names that the pickles of a file would import, as far as they can be read."""
    found: dict[str, None] = {}
    with path.open("rb") as stream:
        try:
            while True:  # torch's old format holds several pickles, one after the other
                found.update(dict.fromkeys(_of_one(stream)))
        except ValueError:  # the end of the file, or of what is a pickle
            return list(found)


def _of_one(stream: BinaryIO) -> Iterator[str]:
    pushed: list[str] = [""]
    memo: dict[int, str] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(pushed[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = pushed[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(argument, ""))
        elif opcode.stack_after:
            pushed.append(argument if isinstance(argument, str) else "")
