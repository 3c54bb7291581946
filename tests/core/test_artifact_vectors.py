"""Tensors in which vectors repeat: bitwise round trips, sizes, and parts that no encoder wrote."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from rarefy.artifact import _smallest, vectors
from rarefy.artifact.bits import to_bits
from rarefy.artifact.codebook import varint
from rarefy.errors import ArtifactError


def quantized(shape: tuple[int, ...], length: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of random vectors out of a few."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(count, length, generator=generator).to(dtype)
    ranks = torch.randint(0, count, (math.prod(shape) // length,), generator=generator)
    return table[ranks].reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize(
    ("shape", "length", "count"),
    [((64, 128), 4, 16), ((32, 16, 3, 3), 9, 40), ((300, 400), 8, 300), ((8, 32), 32, 2), ((20, 6), 2, 1)],
)
def test_it_comes_back_bit_by_bit(shape: tuple[int, ...], length: int, count: int, dtype: torch.dtype) -> None:
    tensor = quantized(shape, length, count, dtype)
    bits = to_bits(tensor)
    part = vectors.encode(bits, shape)
    assert part is not None
    assert np.array_equal(vectors.decode(part, bits.itemsize, shape), bits)


def test_negative_zeros_and_nans_come_back() -> None:
    tensor = torch.tensor([[0.0, -0.0, math.nan, math.inf] * 8] * 16)
    bits = to_bits(tensor)
    part = vectors.encode(bits, (16, 32))
    assert part is not None
    assert np.array_equal(vectors.decode(part, 4, (16, 32)), bits)


def in_blocks(rows: int, length: int, edges: list[int], count: int) -> torch.Tensor:
    """Return a tensor whose blocks, which lie between the edges, have dictionaries of their own."""
    widths = [last - first for first, last in itertools.pairwise(edges)]
    parts = []
    for seed, width in enumerate(widths):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(count, length, generator=generator)
        parts.append(table[torch.randint(0, count, (rows, width), generator=generator)])
    return torch.cat(parts, 1).reshape(rows, -1)


@pytest.mark.parametrize(
    ("rows", "length", "edges", "count"),
    [
        (512, 4, list(range(33)), 64),  # one for each place
        (512, 8, [0, 10, 20, 30], 200),
        (96, 4, [0, 25, 50, 75, 101], 200),  # 101 places make no four equal blocks
        (100, 4, [0, 16, 32, 48, 64], 256),  # more codes in a block than rows
    ],
)
def test_every_block_has_a_dictionary(rows: int, length: int, edges: list[int], count: int) -> None:
    tensor = in_blocks(rows, length, edges, count)
    bits = to_bits(tensor)
    part = vectors.encode(bits, tuple(tensor.shape))
    assert part is not None
    assert part[:2] == varint(length) + varint(len(edges) - 1)
    assert np.array_equal(vectors.decode(part, 4, tuple(tensor.shape)), bits)
    blocks = len(edges) - 1
    table, ranks = 4 * length * count * blocks, rows * edges[-1] * math.log2(count) / 8
    assert len(part) < 1.02 * (table + ranks) + blocks * (3 * count + 16)  # counts and values of the ranks
    assert _smallest(bits, "float32", tuple(tensor.shape), "range")[0] == "vectors"


def test_blocks_take_nothing_where_one_dictionary_serves() -> None:
    bits = to_bits(quantized((512, 64), 4, 64))
    part = vectors.encode(bits, (512, 64))
    assert part is not None
    assert part[1] == 1


@pytest.mark.parametrize(("length", "count"), [(4, 256), (8, 1024), (9, 64)])
def test_the_size_is_that_of_the_table_and_the_ranks(length: int, count: int) -> None:
    shape = (512, 72 * 8)
    bits = to_bits(quantized(shape, length, count))
    part = vectors.encode(bits, shape)
    assert part is not None
    table, ranks = 4 * length * count, math.prod(shape) / length * math.log2(count) / 8
    assert len(part) < 1.02 * (table + ranks) + 4 * count
    coding, stored = _smallest(bits, "float32", shape, "range")
    assert coding == "vectors"
    assert len(stored) == len(part)


def test_what_does_not_repeat_is_ruled_out_fast() -> None:
    bits = to_bits(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    began = time.perf_counter()
    assert vectors.encode(bits, (1024, 1024)) is None
    assert time.perf_counter() - began < 2
    assert vectors.encode(bits[:0], (0, 4)) is None
    assert vectors.encode(bits[:1], ()) is None
    assert vectors.encode(bits[:7], (7,)) is None


SHAPE = (16, 8)
PART = vectors.encode(to_bits(quantized(SHAPE, 4, 5)), SHAPE) or b""


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (b"", "does not end"),
        (varint(5) + PART[1:], "1 blocks of vectors of 5 do not fit"),
        (varint(3) + PART[1:], "vectors of 3 do not fit"),
        (PART[:1] + varint(0) + PART[2:], "0 blocks of vectors of 4"),
        (PART[:1] + varint(3) + PART[2:], "3 blocks of vectors of 4"),
        (PART[:1] + varint(2) + PART[2:], "not fit|does not end|cut off|more codes"),
        (PART[:2] + varint(0) + PART[3:], "0 vectors"),
        (PART[:2] + varint(33) + PART[3:], "33 vectors do not fit the 32"),
        (PART[:2] + varint(4) + PART[3:], "do not stand|exceeds|not fit"),
        (PART[:3] + varint(10**6) + PART[4:], "cut off"),
        (PART[:-1], "cut off"),
        (PART + b"0", "1 bytes follow"),
    ],
)
def test_parts_that_are_not_sound_are_refused(part: bytes, told: str) -> None:
    assert PART
    with pytest.raises(ArtifactError, match=told):
        vectors.decode(part, 4, SHAPE)


@pytest.mark.parametrize("place", range(len(PART)))
def test_a_changed_byte_is_refused_or_gives_other_numbers(place: int) -> None:
    for change in (1, 0x80, 0xFF):
        part = bytearray(PART)
        part[place] ^= change
        try:
            assert vectors.decode(part, 4, SHAPE).size == 128
        except ArtifactError:
            continue


def test_a_cut_off_part_is_refused() -> None:
    for end in range(len(PART)):
        with pytest.raises(ArtifactError):
            vectors.decode(PART[:end], 4, SHAPE)
