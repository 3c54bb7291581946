"""Lossless coding of tensors whose elements are whole multiples of a few steps, as uniform quantization leaves them.

A part is a byte with its form: 0 where all elements share a step, 1 where those of a row do, 2, 3 or 4 where groups of
32, 64 or 128 in a row do; 8 more when symbol 0 means -0.0, 16 more when a symbol has two bytes. Then the code of symbol
0 (zigzag, as a base-128 varint); a measured section with the bits of the steps; and a section with the symbols (see
`symbols`). An element is its code times its group's step. The product is exact, so it is the same on every platform.
"""

from __future__ import annotations

import numpy as np

from rarefy.artifact import codebook
from rarefy.artifact.bits import Bits, elements, row_width, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.artifact.floats import ITEMSIZES, checked, narrowed, products, widened
from rarefy.artifact.grids import GROUPS, LARGEST_CODE, Floats, Grid, candidates
from rarefy.artifact.symbols import read_section, section
from rarefy.errors import ArtifactError

_SIGNED, _WIDE = 8, 16
_CHUNK = 1 << 16


def encode(bits: Bits, dtype: str, shape: tuple[int, ...]) -> bytes | None:
    """Return the coded elements, or None when they have no steps or would not become smaller.

    Steps are sought for the whole tensor, for each index of its first dimension, and for groups within one.
    """
    if dtype not in ITEMSIZES or bits.size == 0:
        return None
    values = widened(bits, dtype)
    grids = _grids(shape)
    best: tuple[float, bytes, Bits] | None = None
    for grid, steps in candidates(values, grids[1].width):
        lowest, signed, symbols = _symbols(values, grid.spread(steps))
        form = grids.index(grid) + _SIGNED * signed + _WIDE * (symbols.itemsize - 1)
        zigzag = 2 * lowest if lowest >= 0 else -2 * lowest - 1
        head = bytes([form]) + varint(zigzag) + measured(section(narrowed(steps, dtype)))
        cost = len(head) + _information(symbols)
        if best is None or cost < best[0]:
            best = cost, head, symbols
    if best is None or best[0] >= bits.nbytes:
        return None
    part = best[1] + section(best[2], row_width(shape))
    return part if len(part) < bits.nbytes else None


def decode(part: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Bits:
    """Return the elements of a part; raise `ArtifactError` when it is not sound."""
    if dtype not in ITEMSIZES:
        raise ArtifactError(f"{dtype} has no steps")
    size, grids, form = elements(shape), _grids(shape), part[0] if part else 255
    number, signed, wide = form % _SIGNED, form // _SIGNED % 2, form // _WIDE
    if not size or number >= len(grids) or wide > 1:
        raise ArtifactError(f"{size} elements have no steps of the form {form}")
    zigzag, at = read_varint(part, 1)
    grid, lowest = grids[number], (zigzag >> 1) ^ -(zigzag & 1)
    coded, at = read_measured(part, at)
    bits = read_section(coded, ITEMSIZES[dtype], size // grid.width * grid.per_line)
    steps = checked(widened(bits, dtype))
    symbols = read_section(part[at:], 1 + wide, size, row_width(shape))
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


def _grids(shape: tuple[int, ...]) -> list[Grid]:
    """Return the grids that a tensor can have, by their numbers in a part."""
    size, width = elements(shape), row_width(shape)
    line = width if width > 1 else size
    return [Grid(size, size), Grid(line, line), *(Grid(line, group) for group in GROUPS if group < line)]
