"""Huffman codes of small integers (Huffman 1952), canonical, so that their lengths say all."""

from __future__ import annotations

import heapq
from itertools import count

import numpy as np
from numpy.typing import NDArray

from rarefy.errors import ArtifactError

Integers = NDArray[np.int64]

LONGEST = 56
"""Bits of the longest codeword; a symbol would have to occur once in more than 10^11 to get a longer one."""
_CHUNK = 1 << 18


def lengths(counts: Integers) -> Integers:
    """Return the bits of each symbol's codeword, 0 for one that never occurs; a lone symbol needs none."""
    found = np.zeros(len(counts), np.int64)
    order = count()
    heap = [(int(number), next(order), [symbol]) for symbol, number in enumerate(counts) if number]
    heapq.heapify(heap)
    while len(heap) > 1:
        one, _, left = heapq.heappop(heap)
        other, _, right = heapq.heappop(heap)
        found[left + right] += 1
        heapq.heappush(heap, (one + other, next(order), left + right))
    return found


def encode(symbols: Integers, bits: Integers) -> bytes:
    """Return the codewords of symbols one after the other, the last byte filled up with zeros."""
    codes = _codewords(bits)
    packed, rest = [], np.zeros(0, np.uint8)
    for start in range(0, len(symbols), _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        sizes = bits[chunk]
        ends = np.cumsum(sizes)
        places = np.repeat(ends, sizes) - 1 - np.arange(ends[-1])  # how many bits of its codeword follow each bit
        word = (np.repeat(codes[chunk], sizes) >> places) & 1
        stream = np.concatenate([rest, word.astype(np.uint8)])
        whole = len(stream) // 8 * 8
        packed.append(np.packbits(stream[:whole]).tobytes())
        rest = stream[whole:]
    return b"".join([*packed, np.packbits(rest).tobytes()])


def decode(data: bytes | bytearray, bits: Integers, size: int) -> Integers:
    """Return the `size` symbols of some codewords; raise `ArtifactError` when they are no whole sound code."""
    used = bits[bits > 0]
    if not len(used):
        raise ArtifactError("a Huffman code has no codewords")
    if used.max() > LONGEST or sum(1 << (LONGEST - int(length)) for length in used) != 1 << LONGEST:
        raise ArtifactError("the lengths are those of no Huffman code")
    stream = np.unpackbits(np.frombuffer(bytes(data), np.uint8))
    symbols = np.empty(size, np.int64)
    done, at = 0, 0
    while done < size and at < len(stream):
        window = stream[at : at + _CHUNK + LONGEST]
        read, at = _read(window, bits, size - done, at)
        symbols[done : done + len(read)] = read
        done += len(read)
    if done < size or len(stream) - at >= 8 or stream[at:].any():
        raise ArtifactError(f"{len(data)} bytes are not the codewords of {size} symbols")
    return symbols


def _read(window: NDArray[np.uint8], bits: Integers, most: int, at: int) -> tuple[Integers, int]:
    """Return the symbols, at most so many, whose codewords begin in the first part of a window, and where they end."""
    found, sizes = _symbols_at(window, bits)
    following = (np.arange(len(window)) + sizes).tolist()
    known = (sizes > 0).tolist()
    places: list[int] = []
    place = 0
    while place < min(_CHUNK, len(window)) and len(places) < most:
        if not known[place]:
            raise ArtifactError("a codeword is cut off")
        places.append(place)
        place = following[place]
    return found[places], at + place


def _symbols_at(window: NDArray[np.uint8], bits: Integers) -> tuple[Integers, Integers]:
    """Return the symbol whose codeword begins at each bit, and its length; 0 where the window ends before it does."""
    order = np.lexsort((np.arange(len(bits)), bits))
    order = order[bits[order] > 0]
    symbols, sizes = np.zeros(len(window), np.int64), np.zeros(len(window), np.int64)
    open_, prefix = np.arange(len(window)), np.zeros(len(window), np.int64)
    first = ranked = 0
    for length in range(1, int(bits.max()) + 1):
        inside = open_ + length <= len(window)
        open_, prefix = open_[inside], prefix[inside]
        prefix = 2 * prefix + window[open_ + length - 1]
        number = int((bits == length).sum())
        hit = prefix - first < number
        symbols[open_[hit]] = order[ranked + prefix[hit] - first]
        sizes[open_[hit]] = length
        open_, prefix = open_[~hit], prefix[~hit]
        first, ranked = 2 * (first + number), ranked + number
    return symbols, sizes


def _codewords(bits: Integers) -> Integers:
    """Return the canonical codewords: ascending by length, then by symbol."""
    codes, code, last = np.zeros(len(bits), np.int64), 0, 0
    for symbol in np.lexsort((np.arange(len(bits)), bits)):
        if length := int(bits[symbol]):
            code <<= length - last
            codes[symbol], code, last = code, code + 1, length
    return codes
