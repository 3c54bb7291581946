"""Huffman codes and Deep Compression's coding of sparse tensors: optimal lengths, round trips, hostile parts."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rarefy.artifact import _smallest, huffman, relative
from rarefy.artifact.bits import to_bits
from rarefy.artifact.codebook import varint
from rarefy.errors import ArtifactError


@pytest.mark.parametrize(
    ("counts", "lengths"),
    [([5, 9, 12, 13, 16, 45], [4, 4, 3, 3, 3, 1]), ([1, 1], [1, 1]), ([0, 3, 0], [0, 0, 0]), ([4, 0, 1], [1, 0, 1])],
)
def test_lengths_of_known_codes(counts: list[int], lengths: list[int]) -> None:
    """The first is the example of Cormen et al., Introduction to Algorithms: 224 bits."""
    assert huffman.lengths(np.array(counts)).tolist() == lengths


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40))
def test_lengths_lie_within_a_bit_of_the_entropy(counts: list[int]) -> None:
    total = sum(counts)
    lengths = huffman.lengths(np.array(counts))
    assert sum(2.0**-length for length in lengths) == 1
    mean = sum(c * length for c, length in zip(counts, lengths, strict=True)) / total
    entropy = sum(c / total * math.log2(total / c) for c in counts)
    assert entropy - 1e-9 <= mean < entropy + 1


@settings(max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_no_other_code_is_shorter(counts: list[int]) -> None:
    def cost(lengths: tuple[int, ...]) -> int:
        return sum(c * length for c, length in zip(counts, lengths, strict=True))

    every = itertools.product(range(1, len(counts)), repeat=len(counts))
    best = min(cost(lengths) for lengths in every if sum(2.0**-length for length in lengths) <= 1)
    assert cost(tuple(huffman.lengths(np.array(counts)))) == best


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(1, 100))
def test_symbols_come_back(symbols: list[int], chunk: int) -> None:
    given_, lengths = np.array(symbols), huffman.lengths(np.bincount(symbols))
    if not lengths.any():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "_CHUNK", chunk)
        data = huffman.encode(given_, lengths)
        assert len(data) == math.ceil(lengths[given_].sum() / 8)
        assert np.array_equal(huffman.decode(data, lengths, len(symbols)), given_)


def sparse(shape: tuple[int, ...], density: float, values: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a random tensor of a few values, most of them zero."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(values, generator=generator).to(dtype)
    kept = torch.rand(shape, generator=generator) < density
    chosen = table[torch.randint(0, values, shape, generator=generator)]
    return torch.where(kept, chosen, torch.zeros((), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "density", "values"),
    [((300, 784), 0.08, 64), ((50, 20, 5, 5), 0.12, 256), ((40, 50), 1.0, 4), ((100, 100), 0.001, 1), ((7,), 1.0, 1)],
)
def test_sparse_tensors_come_back_bit_by_bit(
    shape: tuple[int, ...], density: float, values: int, dtype: torch.dtype
) -> None:
    bits = to_bits(sparse(shape, density, values, dtype))
    part = relative.encode(bits)
    assert part is not None
    assert np.array_equal(relative.decode(part, bits.itemsize, bits.size), bits)


def test_negative_zeros_and_nans_come_back() -> None:
    bits = to_bits(torch.tensor([0.0, -0.0, math.nan, math.inf] * 32))
    part = relative.encode(bits)
    assert part is not None
    assert np.array_equal(relative.decode(part, 4, bits.size), bits)


def test_the_size_is_that_of_the_paper_s_scheme() -> None:
    """8 % of 235,200 weights in 64 values: about 6 bits a code and the entropy of geometric distances."""
    density, size = 0.08, 235_200
    part = relative.encode(to_bits(sparse((300, 784), density, 64)))
    assert part is not None
    distance = (-density * math.log2(density) - (1 - density) * math.log2(1 - density)) / density
    expected = size * density * (6 + distance) / 8 + 64 * 4
    assert expected < len(part) < 1.04 * expected


def test_it_is_used_when_asked_for_only_and_range_coding_is_smaller() -> None:
    tensor = sparse((300, 784), 0.08, 64)
    coding, ours = _smallest(to_bits(tensor), "float32", (300, 784), "range")
    assert coding == "codebook"
    coding, theirs = _smallest(to_bits(tensor), "float32", (300, 784), "huffman")
    assert coding == "huffman"
    assert len(ours) < len(theirs)


def test_what_would_not_shrink_is_left_alone() -> None:
    assert relative.encode(to_bits(torch.zeros(10))) is None
    assert relative.encode(to_bits(torch.zeros(0))) is None
    assert relative.encode(to_bits(torch.randn(500, generator=torch.Generator().manual_seed(0)))) is None


BITS = to_bits(sparse((16, 16), 0.3, 5))
PART = relative.encode(BITS) or b""


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (b"", "does not end"),
        (varint(0) + PART[1:], "do not fit"),
        (varint(10**9) + PART[1:], "do not fit"),
        (PART[:1] + varint(40) + PART[2:], "do not fit"),
        (PART[:2] + varint(257) + PART[3:], "do not fit"),
        (PART[:-1], "not the codewords"),
        (PART + b"\0", "not the codewords"),
    ],
)
def test_parts_that_are_not_sound_are_refused(part: bytes, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        relative.decode(part, 4, 256)


@pytest.mark.parametrize("place", range(len(PART)))
def test_a_changed_byte_is_refused_or_gives_other_numbers(place: int) -> None:
    for change in (1, 0x80, 0xFF):
        part = bytearray(PART)
        part[place] ^= change
        try:
            assert relative.decode(part, 4, 256).size == 256
        except ArtifactError:
            continue


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_give_numbers(part: bytes) -> None:
    with contextlib.suppress(ArtifactError):
        assert relative.decode(part, 4, 256).size == 256


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 2], [2, 2, 2], [60, 60], [0, 0]])
def test_lengths_of_no_code_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ArtifactError, match=r"no Huffman code|no codewords"):
        huffman.decode(b"\0" * 8, np.array(lengths), 3)
