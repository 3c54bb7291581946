"""Lossless coding of tensors whose elements are whole multiples of a few steps, as uniform quantization leaves them.

A part is, all numbers as base-128 varints: the width of a line and the size of a group (see `grids.Grid`); the code of
symbol 0 (zigzag); whether symbol 0 means -0.0 instead (0 or 1); the bytes of a symbol (1 or 2). Then the steps, one
section with its length for each byte of the tensor's type, low bytes first; then a section with the symbols (see
`symbols`). An element is its code times its group's step. The product is exact, so it is the same on every
platform.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rarefy.artifact import codebook
from rarefy.artifact.bits import Bits, elements, row_width, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.artifact.floats import ITEMSIZES, checked, narrowed, products, widened
from rarefy.artifact.grids import GROUPS, LARGEST_CODE, Floats, Grid, candidates
from rarefy.artifact.symbols import read_section, section
from rarefy.errors import ArtifactError

_CHUNK = 1 << 16


def encode(bits: Bits, dtype: str, shape: tuple[int, ...]) -> bytes | None:
    """Return the coded elements, or None when they have no steps or would not become smaller.

    Steps are sought for the whole tensor, for each index of its first dimension, and for groups within one.
    """
    if dtype not in ITEMSIZES or bits.size == 0:
        return None
    values = widened(bits, dtype)
    width = row_width(shape)
    best: tuple[float, bytes, Bits] | None = None
    for grid, steps in candidates(values, width if width > 1 else bits.size):
        lowest, signed, symbols = _symbols(values, grid.spread(steps))
        head = _head(grid, lowest, signed, symbols.itemsize) + b"".join(_planes(narrowed(steps, dtype)))
        cost = len(head) + _information(symbols)
        if best is None or cost < best[0]:
            best = cost, head, symbols
    if best is None or best[0] >= bits.nbytes:
        return None
    part = best[1] + section(best[2], width)
    return part if len(part) < bits.nbytes else None


def decode(part: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Bits:
    """Return the elements of a part; raise `ArtifactError` when it is not sound."""
    if dtype not in ITEMSIZES:
        raise ArtifactError(f"{dtype} has no steps")
    size = elements(shape)
    (width, group, zigzag, signed, itemsize), at = _numbers(part)
    grouped = group == width or group in GROUPS
    if not (2 <= width <= size or width == size == 1) or size % width or not 1 <= group <= width or not grouped:
        raise ArtifactError(f"groups of {group} in lines of {width} do not fit {size} elements")
    if signed > 1 or itemsize not in (1, 2):
        raise ArtifactError("the symbols have no known form")
    grid, lowest = Grid(width, group), (zigzag >> 1) ^ -(zigzag & 1)
    steps, at = _read_steps(part, at, dtype, size // width * grid.per_line)
    symbols = read_section(part[at:], itemsize, size, row_width(shape))
    if not -LARGEST_CODE - signed <= lowest <= LARGEST_CODE - int(symbols.max()):
        raise ArtifactError(f"the codes exceed {LARGEST_CODE}")
    codes = np.arange(lowest, lowest + int(symbols.max()) + 1).astype(np.float64)
    if signed:
        codes[0] = -0.0
    return products(codes, symbols, grid.spread(steps), dtype)


def _symbols(values: Floats, steps: Floats) -> tuple[int, bool, Bits]:
    """Return the code of symbol 0, whether it stands for -0.0 instead, and the symbols."""
    codes = np.empty(values.size, np.int32)
    for start in range(0, values.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        codes[chunk] = values[chunk] / steps[chunk]
    negative = values.view(np.int32) == np.int32(-(2**31))
    signed = bool(negative.any())
    lowest = int(codes.min()) - signed
    itemsize = 1 if int(codes.max()) - lowest < 256 else 2
    codes -= lowest
    symbols = codes.astype(stored(itemsize))
    symbols[negative] = 0
    return lowest, signed, symbols


def _information(symbols: Bits) -> float:
    """Return about how many bytes the symbols and their histogram take."""
    counts = codebook.histogram(symbols)[1]
    coded = float((counts * np.log2(symbols.size / counts)).sum()) / 8 + len(counts) * (symbols.itemsize + 2)
    return min(coded, symbols.nbytes)


def _head(grid: Grid, lowest: int, signed: bool, itemsize: int) -> bytes:
    zigzag = 2 * lowest if lowest >= 0 else -2 * lowest - 1
    return b"".join(varint(number) for number in (grid.width, grid.group, zigzag, signed, itemsize))


def _numbers(part: bytes | bytearray) -> tuple[list[int], int]:
    numbers, at = [], 0
    for _ in range(5):
        number, at = read_varint(part, at)
        numbers.append(number)
    return numbers, at


def _planes(steps: Bits) -> Iterator[bytes]:
    """Yield one section for each byte of the steps: signs and exponents are alike, low bytes of mantissas often 0."""
    for plane in steps.view(np.uint8).reshape(-1, steps.itemsize).T:
        yield measured(section(np.ascontiguousarray(plane)))


def _read_steps(part: bytes | bytearray, at: int, dtype: str, count: int) -> tuple[Floats, int]:
    planes = []
    for _ in range(ITEMSIZES[dtype]):
        data, at = read_measured(part, at)
        planes.append(read_section(data, 1, count))
    return checked(widened(np.stack(planes, axis=1).reshape(-1).view(stored(len(planes))), dtype)), at
