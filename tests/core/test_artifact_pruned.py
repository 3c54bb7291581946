"""Codes that are mostly zero: round trips, sizes, parts that are not sound."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rarefy.artifact import adaptive, pruned
from rarefy.artifact.codebook import varint
from rarefy.artifact.grids import LARGEST_CODE
from rarefy.errors import ArtifactError

GOLDEN = "10021bde010e286cf2fa288fb278c26d63ab353717bfe6b2ce"


def codes_of(rows: int, width: int, kept: float, seed: int = 0) -> NDArray[np.int32]:
    """What magnitude pruning and an even grid leave: nothing near zero, two sides alike."""
    drawn = np.random.default_rng(seed).laplace(size=rows * width)
    floor = np.quantile(np.abs(drawn), 1 - kept)
    return (np.round(drawn / 0.6) * (np.abs(drawn) > floor)).astype(np.int32)


def entropy(codes: NDArray[np.int32]) -> float:
    """Return the order-0 entropy in bytes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


@pytest.mark.parametrize("kept", [0.3, 0.1, 0.05, 0.02])
@pytest.mark.parametrize("rows", [16, 64])
def test_the_size_is_the_entropy_and_a_dozen_bytes(rows: int, kept: float) -> None:
    codes = codes_of(rows, 144, kept)
    part = pruned.encode(codes, 144)
    assert part is not None
    assert len(part) < 1.005 * entropy(codes) + 13
    assert np.array_equal(pruned.decode(part, rows, 144), codes)


def test_pruned_inputs_take_less_than_the_entropy() -> None:
    codes = codes_of(100, 784, 0.2).reshape(100, 784)
    codes[:, np.random.default_rng(0).permutation(784)[:392]] = 0
    part = pruned.encode(codes.reshape(-1), 784)
    assert part is not None
    assert len(part) < 0.92 * entropy(codes.reshape(-1))
    assert np.array_equal(pruned.decode(part, 100, 784), codes.reshape(-1))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_decoding_undoes_encoding(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    alphabet = data.draw(st.lists(st.integers(-LARGEST_CODE, LARGEST_CODE), min_size=1, max_size=12))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    drawn = np.array(alphabet, np.int32)[generator.integers(0, len(alphabet), rows * width)]
    codes = np.where(generator.random(rows * width) < data.draw(st.floats(0, 1)), drawn, 0).astype(np.int32)
    part = pruned.encode(codes, width)
    others = np.abs(codes[codes != 0])
    if part is None:
        few = not 0 < others.size <= 0.75 * codes.size
        assert few or np.ptp(others) >= adaptive.MOST_SYMBOLS
    else:
        assert np.array_equal(pruned.decode(part, rows, width), codes)


def test_the_coding_is_fixed_for_good() -> None:
    """Files outlive versions: these bytes must never change."""
    places = np.arange(160)
    codes = np.where(places * 7919 % 31 < 3, (places % 15 + 2) * np.where(places * 31 % 13 < 6, 1, -1), 0)
    assert pruned.encode(codes.astype(np.int32), 16) == bytes.fromhex(GOLDEN)
    assert np.array_equal(pruned.decode(bytes.fromhex(GOLDEN), 10, 16), codes)


def head(count: int, least: int, extent: int, *decay: int) -> bytes:
    return b"".join(map(varint, (count, least, 2 * extent, *decay)))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (b"", "does not end"),
        (head(3, 1, 4), "does not end"),
        (head(0, 1, 0) + bytes(8), "0 integers do not lie in 160 places"),
        (head(161, 1, 0) + bytes(8), "161 integers"),
        (head(2**60, 1, 0) + bytes(8), "integers do not lie"),
        (head(3, 0, 0) + bytes(8), "no integers lie"),
        (head(3, LARGEST_CODE + 1, 0) + bytes(8), "no integers lie"),
        (head(3, LARGEST_CODE - 3, 4, 9) + bytes(8), "no integers lie"),
        (head(3, 1, adaptive.MOST_SYMBOLS, 9) + bytes(8), "no integers lie"),
        (head(3, 1, 4, 256) + bytes(8), "decay of 256"),
        (head(3, 1, 4, 9) + bytes(7), "whole words"),
        (head(3, 1, 4, 9) + bytes(8), "there are not 3 places"),
        (bytes.fromhex(GOLDEN) + bytes(40), "more codes than elements"),
        (head(90, 1, 4, 9), "there are not 90 places"),
    ],
)
def test_parts_that_are_not_sound_are_refused(part: bytes, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        pruned.decode(part, 10, 16)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([b"", head(3, 1, 0), head(20, 1, 9, 100)]), st.binary(max_size=60))
def test_any_bytes_are_refused_or_give_the_right_number_of_integers(start: bytes, rest: bytes) -> None:
    with contextlib.suppress(ArtifactError):
        decoded = pruned.decode(start + rest, 12, 8)
        assert decoded.shape == (96,)
        assert np.abs(decoded).max() <= LARGEST_CODE
