"""Lossless coding of tensors whose elements are whole multiples of a few steps, as uniform quantization leaves them.

A part is a byte with its form: 0 where all elements share a step, 1 where those of a row do, 2, 3 or 4 where groups of
32, 64 or 128 in a row do; 8 more when symbol 0 means -0.0, 16 more when a symbol has two bytes. Then the code of symbol
0 (zigzag, as a base-128 varint); a measured section with the bits of the steps; and a section with the symbols (see
`symbols`). An element is its code times its group's step. The product is exact, so it is the same on every platform.

32 more when the codes are those of pruned weights: then the steps are followed by what `pruned` makes of the codes. A
step that all share is no section then, but its bits, without the lowest byte when the form has 64 more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rarefy.artifact import codebook, pruned
from rarefy.artifact.bits import Bits, elements, row_width, stored
from rarefy.artifact.codebook import measured, read_measured, read_varint, varint
from rarefy.artifact.floats import ITEMSIZES, checked, narrowed, products, widened
from rarefy.artifact.grids import GROUPS, LARGEST_CODE, Floats, Grid, candidates
from rarefy.artifact.symbols import LARGE, SPARSE, read_section, section
from rarefy.errors import ArtifactError

_SIGNED, _WIDE, _PRUNED, _SHORT = 8, 16, 32, 64
_FORMS = (*(_SIGNED * signed + _WIDE * wide for signed in (0, 1) for wide in (0, 1)), _PRUNED, _PRUNED + _SHORT)
"""What may be added to the number of a grid."""
_CHUNK = 1 << 16


def encode(bits: Bits, dtype: str, shape: tuple[int, ...]) -> bytes | None:
    """Return the coded elements, or None when they have no steps or would not become smaller.

    Steps are sought for the whole tensor, for each index of its first dimension, and for groups within one.
    """
    if dtype not in ITEMSIZES or bits.size == 0:
        return None
    values, grids = widened(bits, dtype), _grids(shape)
    found = [
        _Codes(grids.index(grid), narrowed(steps, dtype), *_symbols(values, grid.spread(steps)))
        for grid, steps in candidates(values, grids[1].width)
    ]
    best = min(found, key=_Codes.cost, default=None)
    if best is None or best.cost() >= bits.nbytes:
        return None
    part = min(best.parts(row_width(shape)), key=len)
    return part if len(part) < bits.nbytes else None


def decode(part: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Bits:
    """Return the elements of a part; raise `ArtifactError` when it is not sound."""
    if dtype not in ITEMSIZES:
        raise ArtifactError(f"{dtype} has no steps")
    size, grids, form = elements(shape), _grids(shape), part[0] if part else 255
    number = form % _SIGNED
    if not size or number >= len(grids) or form not in (number + flags for flags in _FORMS):
        raise ArtifactError(f"{size} elements have no steps of the form {form}")
    grid, width = grids[number], row_width(shape)
    zigzag, at = (0, 1) if form & _PRUNED else read_varint(part, 1)
    if form & _PRUNED and number == 0:
        end = at + ITEMSIZES[dtype] - bool(form & _SHORT)
        bits = np.frombuffer(bytes(part[at:end]).rjust(ITEMSIZES[dtype], b"\0"), stored(ITEMSIZES[dtype]))
    else:
        coded, end = read_measured(part, at)
        bits = read_section(coded, ITEMSIZES[dtype], size // grid.width * grid.per_line)
    steps = checked(widened(bits, dtype))
    if form & _PRUNED:
        codes = pruned.decode(part[end:], size // width, width)
        lowest = int(codes.min())
        symbols = (codes - lowest).astype(stored(2))
    else:
        lowest = (zigzag >> 1) ^ -(zigzag & 1)
        symbols = read_section(part[end:], 2 if form & _WIDE else 1, size, width)
    return _elements(lowest, bool(form & _SIGNED), symbols, grid.spread(steps), dtype)


def _elements(lowest: int, signed: bool, symbols: Bits, steps: Floats, dtype: str) -> Bits:
    if not -LARGEST_CODE - signed <= lowest <= LARGEST_CODE - int(symbols.max()):
        raise ArtifactError(f"the codes exceed {LARGEST_CODE}")
    codes = np.arange(lowest, lowest + int(symbols.max()) + 1).astype(np.float64)
    if signed:
        codes[0] = -0.0
    return products(codes, symbols, steps, dtype)


@dataclass(frozen=True)
class _Codes:
    """Elements as multiples of steps."""

    grid: int
    """Its number in a part."""
    steps: Bits
    lowest: int
    """Code of symbol 0."""
    signed: bool
    """Whether symbol 0 stands for -0.0 instead."""
    symbols: Bits

    def cost(self) -> float:
        """Return about how many bytes the plain form takes."""
        return len(self._head()) + _information(self.symbols)

    def parts(self, width: int) -> list[bytes]:
        """Return the forms that are worth trying."""
        coded = section(self.symbols, width)
        parts = [self._head() + coded]
        if not self.signed and (self.symbols.size < LARGE or coded[0] == SPARSE):
            zeros_apart = pruned.encode(self.symbols.astype(np.int32) + self.lowest, width)
            parts += [self._pruned_head() + zeros_apart] if zeros_apart is not None else []
        return parts

    def _head(self) -> bytes:
        form = self.grid + _SIGNED * self.signed + _WIDE * (self.symbols.itemsize - 1)
        zigzag = 2 * self.lowest if self.lowest >= 0 else -2 * self.lowest - 1
        return bytes([form]) + varint(zigzag) + measured(section(self.steps))

    def _pruned_head(self) -> bytes:
        if self.grid:
            return bytes([self.grid + _PRUNED]) + measured(section(self.steps))
        plain = self.steps.tobytes()
        short = plain[0] == 0
        return bytes([_PRUNED + _SHORT * short]) + plain[short:]


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
