"""Symbols coded with learnt counts, and paths through the trellis: round trips, sizes, hostile parts."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rarefy import trellis
from rarefy.artifact import _smallest, adaptive, codebook, masks, paths, symbols
from rarefy.artifact.bits import to_bits
from rarefy.artifact.codebook import varint
from rarefy.errors import ArtifactError


def entropy(numbers: NDArray[np.integer]) -> float:
    """Return the order-0 entropy of all numbers together, in bytes."""
    counts = np.unique(numbers, return_counts=True)[1]
    return float((counts * np.log2(numbers.size / counts)).sum() / 8)


def gaussian(size: int, spread: float, seed: int = 0) -> NDArray[np.uint8]:
    drawn = np.random.default_rng(seed).normal(size=size) * spread
    return np.clip(np.round(drawn) + 128, 0, 255).astype("<u1")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_sections_come_back(data: st.DataObject) -> None:
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    alphabet = data.draw(st.lists(st.integers(0, 256**itemsize - 1), min_size=1, max_size=40, unique=True))
    rows, width = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 60))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    numbers = np.array(alphabet, f"<u{itemsize}")[
        generator.integers(0, len(alphabet), rows * width) ** 2 % len(alphabet)
    ]
    section = symbols.section(numbers, width)
    assert len(section) <= 1 + numbers.nbytes
    back = symbols.read_section(section, itemsize, numbers.size, width)
    assert back.dtype == numbers.dtype
    assert np.array_equal(back, numbers)


@pytest.mark.parametrize("size", [200, 2000, 20000])
def test_learnt_counts_take_less_than_a_histogram_where_there_are_few_symbols(size: int) -> None:
    numbers = gaussian(size, 4)
    section = symbols.section(numbers, 10)
    assert section[0] == symbols.LEARNT
    assert len(section) < entropy(numbers) + 45
    assert len(section) < len(codebook.encode(numbers) or b"")


def test_columns_that_differ_take_less_than_the_order_0_entropy() -> None:
    """Inputs that are pruned away, as the border of MNIST's images."""
    generator = np.random.default_rng(0)
    numbers = (generator.integers(0, 8, (300, 784)) * (generator.random((300, 784)) < 0.16)).astype("<u1")
    numbers[:, generator.permutation(784)[:392]] = 0
    section = symbols.section(numbers.reshape(-1), 784)
    live = numbers[:, numbers.any(axis=0)]
    assert len(section) < 1.03 * entropy(live) < 0.91 * entropy(numbers)


def test_places_take_less_where_neighbours_rows_or_columns_go_together() -> None:
    """Such as the pixels that the units of LeNet-300-100 look at."""
    generator = np.random.default_rng(0)
    busy = generator.random((200, 1)) ** 3 * np.repeat(generator.random((200, 98)) < 0.2, 8, axis=1)
    mask = generator.random((200, 784)) < busy
    numbers = (mask * generator.integers(1, 20, mask.shape)).astype("<u1")
    section = symbols.section(numbers.reshape(-1), 784)
    assert section[0] == symbols.SPARSE
    values = numbers[mask]
    order_0 = entropy(mask)
    assert len(section) - entropy(values) < 0.75 * order_0
    assert np.array_equal(symbols.read_section(section, 1, numbers.size, 784), numbers.reshape(-1))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_masks_come_back(rows: int, width: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, width)) < density
    assert np.array_equal(masks.decode(masks.encode(mask), rows, width, int(mask.sum())), mask)


def test_the_coding_of_masks_is_fixed_for_good() -> None:
    """Files outlive versions: these bytes must never change."""
    mask = (np.arange(160).reshape(10, 16) * 7919) % 31 < 6
    assert masks.encode(mask) == bytes.fromhex(MASK_GOLDEN)
    assert np.array_equal(masks.decode(bytes.fromhex(MASK_GOLDEN), 10, 16, int(mask.sum())), mask)


@pytest.mark.parametrize("size", [100, 1 << 21])
def test_floats_rounded_to_16_bits_take_no_more(size: int) -> None:
    floats = torch.randn(size, generator=torch.Generator().manual_seed(0))
    rounded = to_bits(floats.bfloat16().float())
    section = symbols.section(rounded)
    assert section[0] == symbols.PLANES or size > 100
    assert len(section) < 2 * size + 40
    assert np.array_equal(symbols.read_section(section, 4, size), rounded)


def test_two_numbers_that_are_both_frequent_come_back() -> None:
    """Such as zeros of either sign."""
    drawn = np.random.default_rng(0).random((64, 100))
    numbers = np.select([drawn < 0.45, drawn < 0.85], [0, 1 << 31], (drawn * 2**32)).astype("<u4").reshape(-1)
    section = symbols.section(numbers, 100)
    assert section[0] == symbols.SPARSE
    assert np.array_equal(symbols.read_section(section, 4, numbers.size, 100), numbers)


def test_large_tensors_keep_the_fast_way_where_columns_are_alike() -> None:
    assert symbols.section(gaussian(1 << 20, 4), 1024)[0] == symbols.COUNTED
    halves = np.concatenate([gaussian(1 << 19, 1).reshape(1024, -1), gaussian(1 << 19, 20).reshape(1024, -1)], axis=1)
    section = symbols.section(halves.reshape(-1), 1024)
    assert section[0] != symbols.COUNTED
    assert np.array_equal(symbols.read_section(section, 1, 1 << 20, 1024), halves.reshape(-1))


def test_the_learnt_coding_is_fixed_for_good() -> None:
    """Files outlive versions: these bytes must never change."""
    numbers = np.array([3, 3, 4, 2, 3, 3, 5, 3, 0, 3, 3, 4, 3, 3, 2, 3] * 4, "<u1")
    coded = adaptive.encode(numbers, 8, 3)
    assert coded == bytes.fromhex(LEARNT_GOLDEN)
    assert np.array_equal(adaptive.decode(bytes.fromhex(LEARNT_GOLDEN), 64, 8), numbers)


MASK_GOLDEN = "01d36230da42a16c526ea0a374a47ed5ee"
LEARNT_GOLDEN = "06035c01a439d796b128d3208a1144f70a0e05b7"

NUMBERS = gaussian(96, 2)
PART = symbols.section(NUMBERS, 8)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (b"", "do not stand"),
        (PART[:1] + varint(1) + PART[3:], "no counts can start"),
        (PART[:1] + varint(5000) + PART[3:], "no counts can start"),
        (PART[:-1], "whole words"),
        (b"\x05", "does not end"),
        (b"\x07", "do not stand"),
        (bytes([symbols.SPARSE]), "does not end"),
        (bytes([symbols.SPARSE, 0]) + varint(97) + varint(0), "more numbers than places"),
        (bytes([symbols.SPARSE, 0]) + varint(1) + varint(0) + bytes([symbols.SPARSE]), "more numbers than places"),
        (bytes([symbols.SPARSE, 0]) + varint(1) + varint(9), "cut off"),
        (bytes([symbols.SPARSE, 0]) + varint(90) + varint(1) + bytes(92), "there are not 90 places"),
        (bytes([symbols.SPARSE, 0]) + varint(9) + varint(3) + bytes(13), "whole words"),
        (bytes([symbols.SPARSE, 0]) + varint(9) + varint(1) + b"\2", "no known way"),
        (bytes([symbols.LISTED]) + varint(1) + bytes(20), "1 distinct values"),
        (bytes([symbols.LISTED]) + varint(9000) + bytes(20), "9000 distinct values"),
        (bytes([symbols.LISTED]) + varint(9) + varint(80), "cut off"),
        (bytes([symbols.PLANES]) + varint(9) + bytes(9), "no planes"),
    ],
)
def test_sections_that_are_not_sound_are_refused(part: bytes, told: str) -> None:
    assert PART[0] == symbols.LEARNT
    with pytest.raises(ArtifactError, match=told):
        symbols.read_section(part, 1, 96, 8)


def test_rows_that_do_not_fit_are_refused() -> None:
    for size, width in ((97, 8), (96, 0), (0, 8)):
        with pytest.raises(ArtifactError, match="do not lie in rows"):
            symbols.read_section(PART, 1, size, width)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([b"", b"\2", b"\3", b"\4\0\5\4", PART[:5]]), st.binary(max_size=60), st.sampled_from([1, 2, 4]))
def test_any_bytes_are_refused_or_give_the_right_number_of_numbers(start: bytes, rest: bytes, itemsize: int) -> None:
    with contextlib.suppress(ArtifactError):
        assert symbols.read_section(start + rest, itemsize, 96, 8).shape == (96,)


# Paths through the trellis


def path(shape: tuple[int, ...], spread: float = 3, seed: int = 0) -> NDArray[np.int64]:
    """Return the multiples of random indices."""
    drawn = np.round(np.random.default_rng(seed).normal(size=math.prod(shape)) * spread).astype(np.int64)
    return trellis.values(drawn.reshape(trellis.rows(shape), -1)).reshape(shape)


def test_every_state_has_two_next_ones_and_two_before() -> None:
    assert sorted(trellis.NEXT.reshape(-1).tolist()) == sorted([*range(8), *range(8)])
    assert all(one != other for one, other in trellis.NEXT.tolist())


def test_indices_undo_values() -> None:
    drawn = np.random.default_rng(0).integers(-5, 6, (70, 9))
    multiples = trellis.values(drawn)
    assert np.array_equal(trellis.indices(multiples), drawn)
    assert not (multiples[0] % 2).any(), "the first quantizer takes even multiples"
    changed = multiples.copy()
    changed[0, 0] += 1
    assert trellis.indices(changed) is None


@pytest.mark.parametrize(
    ("shape", "rows"), [((64, 10), 64), ((16, 144), 64), ((10, 500), 100), ((16, 3), 48), ((7, 13), 91), ((300,), 300)]
)
def test_sequences_have_64_elements_where_they_can(shape: tuple[int, ...], rows: int) -> None:
    assert trellis.rows(shape) == rows
    assert math.prod(shape) % rows == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 100), (16, 16, 3, 3), (10, 500), (7, 13)])
def test_paths_come_back_bit_by_bit_and_take_half_of_the_multiples(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    multiples = path(shape)
    tensor = (torch.from_numpy(multiples).double() * 0.0078125).to(dtype)
    bits, name = to_bits(tensor), str(dtype).removeprefix("torch.")
    part = paths.encode(bits, name, shape)
    assert part is not None
    assert np.array_equal(paths.decode(part, name, shape), bits)
    if tensor.numel() > 2000:
        assert len(part) < entropy(multiples) - 0.75 * multiples.size / 8
        assert _smallest(bits, name, shape, "range")[0] == "trellis"


def test_what_is_no_path_is_left_to_others() -> None:
    assert paths.encode(to_bits(torch.arange(640.0).reshape(64, 10)), "float32", (64, 10)) is None
    assert paths.encode(to_bits(torch.randn(64, 10)), "float32", (64, 10)) is None
    assert paths.encode(to_bits(torch.zeros(64, 10)), "float32", (64, 10)) is None
    assert paths.encode(to_bits(torch.arange(100).reshape(10, 10)), "int64", (10, 10)) is None
    assert paths.encode(to_bits(torch.zeros(0, 10)), "float32", (0, 10)) is None
    negative = torch.from_numpy(path((64, 10))).float()
    negative[3] = -0.0
    assert paths.encode(to_bits(negative), "float32", (64, 10)) is None


TENSOR = torch.from_numpy(path((64, 3))).float() * 0.5
PATH = paths.encode(to_bits(TENSOR), "float32", (64, 3)) or b""


@pytest.mark.parametrize(
    ("part", "dtype", "shape", "told"),
    [
        (PATH, "int32", (64, 3), "no trellis"),
        (PATH, "float32", (192,), "no trellis"),
        (PATH, "float32", (0, 3), "no trellis"),
        (PATH, "float32", (2**27, 2), "no trellis"),
        (PATH[:3], "float32", (64, 3), "no trellis"),
        (bytes(4) + PATH[4:], "float32", (64, 3), "no positive number|not a positive"),
        (PATH[:4] + varint(10**6) + PATH[5:], "float32", (64, 3), "exceed"),
        (PATH[:-1], "float32", (64, 3), "whole words"),
    ],
)
def test_paths_that_are_not_sound_are_refused(part: bytes, dtype: str, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        paths.decode(part, dtype, shape)


@pytest.mark.parametrize("place", range(0, len(PATH), 3))
def test_a_changed_byte_is_refused_or_gives_other_numbers(place: int) -> None:
    for change, shape in itertools.product((1, 0x80, 0xFF), [(64, 3), (8, 24)]):
        part = bytearray(PATH)
        part[place] ^= change
        with contextlib.suppress(ArtifactError):
            assert paths.decode(part, "float32", shape).shape == (192,)
