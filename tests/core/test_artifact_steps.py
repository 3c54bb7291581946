from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rarefy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rarefy import artifact
from rarefy.artifact import pruned, steps, symbols
from rarefy.artifact.bits import Bits, row_width, to_bits
from rarefy.artifact.codebook import measured, varint
from rarefy.artifact.grids import LARGEST_CODE, Grid, candidates
from rarefy.errors import ArtifactError
from rarefy.modules import Base
from torch import nn

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEARNT_GOLDEN = (
    "01050d000000803f0000bc3e0000403c0207039201015f8594afe3706ff04e6165df60be60d2a5699a82766ce7fcfc88a2b98d9775e5"
)
PRUNED_GOLDEN = "210d000000803f0000bc3e0000403c360105aa01ab2fb5a84d5dc62e1ad2e0e13e6c20a467770a87204223048082c413"
GOLDEN = (
    "01050d000000803f0000bc3e0000403c0107000102030405060303061b12039eb01d7f63db5b252883abaae380ea19652a88de6514c8b4"
)


def quantized(
    shape: tuple[int, ...], bits: int, group: int | None = None, seed: int = 0, per_row: bool = True
) -> tuple[torch.Tensor, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Gaussian weights rounded to a symmetric grid with steps of 16 significant bits; also their codes and steps."""
    generator = np.random.default_rng(seed)
    rows = shape[0]
    weights = generator.normal(size=(rows, math.prod(shape) // rows)) * generator.uniform(0.3, 3, size=(rows, 1))
    lines = weights.reshape(rows if per_row else 1, -1)
    groups = lines.reshape(len(lines), -1, group or lines.shape[1])
    top = max(1, 2 ** (bits - 1) - 1)
    fine = (np.abs(groups).max(-1, keepdims=True) / top).astype(np.float32)
    sizes = ((fine.view(np.int32) + 128) & ~255).view(np.float32)
    codes = np.clip(np.round(groups / sizes), -top, top)
    return torch.from_numpy((codes * sizes + np.float32(0)).astype(np.float32)).reshape(shape), codes, sizes


def entropy(codes: np.ndarray[Any, Any]) -> float:
    """Order-0 entropy of all codes, in bytes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


def encode(tensor: torch.Tensor) -> bytes | None:
    return steps.encode(to_bits(tensor), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def decode(part: bytes | bytearray, like: torch.Tensor) -> Bits:
    return steps.decode(part, str(like.dtype).removeprefix("torch."), tuple(like.shape))


def coded(tensor: torch.Tensor) -> bytes:
    """The part of a tensor that is coded by steps and comes back to the last bit."""
    part = encode(tensor)
    assert part is not None
    assert len(part) < tensor.nbytes
    assert np.array_equal(decode(part, tensor), to_bits(tensor))
    return part


WHOLE, ROW, OF_32, OF_64, OF_128 = range(5)


def shared(part: bytes) -> int:
    """Return by whom a step is shared."""
    return part[0] % 8


def holding(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.register_buffer("t", tensor)
    return model


def file_of(tensor: torch.Tensor, folder: Path) -> Path:
    artifact.write(holding(tensor), Base(lambda: holding(tensor)), folder / "m.rarefy")
    return folder / "m.rarefy"


# Finding steps


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_step_is_the_greatest_common_divisor(data: st.DataObject) -> None:
    scale = data.draw(st.integers(1, 2**16 - 1)) * 2.0 ** data.draw(st.integers(-100, 80))
    codes = data.draw(st.lists(st.integers(-255, 255), min_size=2, max_size=40))
    values = np.array([code * scale for code in codes], np.float32)
    (grid, found), *_ = candidates(values, len(values))
    exact = [Fraction(float(value)) for value in values]
    common = math.lcm(*(value.denominator for value in exact))
    divisor = Fraction(math.gcd(*(int(value * common) for value in exact)), common)
    assert grid == Grid(len(values), len(values))
    assert found.tolist() == [float(divisor) if divisor else 1.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("group", "per_row", "sharing"), [(None, False, WHOLE), (None, True, ROW), (32, True, OF_32), (64, True, OF_64)]
)
def test_the_granularity_is_found(bits: int, group: int | None, per_row: bool, sharing: int) -> None:
    assert shared(coded(quantized((16, 64, 3, 3), bits, group, per_row=per_row)[0])) == sharing


def test_groups_of_128_are_found_and_the_last_of_a_row_may_be_shorter() -> None:
    assert shared(coded(quantized((8, 512), 4, 128)[0])) == OF_128
    assert shared(coded(quantized((8, 1024), 4, 128)[0][:, :1000])) == OF_128


def test_spreading_gives_each_element_the_step_of_its_group() -> None:
    assert Grid(5, 2).spread(np.array([1, 2, 3, 4, 5, 6])).tolist() == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    assert Grid(6, 6).spread(np.array([7])).tolist() == [7] * 6


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_the_size_of_codes_decides(dtype: torch.dtype) -> None:
    """Codes of 16 bits are taken where their step leaves them exact, greater ones never."""
    codes = torch.arange(-127, 129).repeat(8).reshape(4, -1).to(torch.float32)
    assert encode((codes * 0.25).to(dtype)) is not None
    largest = torch.tensor([1.0, LARGEST_CODE] * 200)
    assert encode(largest) is not None
    assert encode(torch.cat([largest, torch.tensor([LARGEST_CODE + 1.0])])) is None


def test_asymmetric_grids_are_multiples_of_their_step_too() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, zeros = torch.rand(32, 1, generator=generator).to(torch.bfloat16).float() + 2**-8, torch.arange(32)[:, None]
    codes = torch.randint(0, 256, (32, 200), generator=generator)
    assert shared(coded((codes - 3 * zeros) * sizes)) == ROW


# Coming back to the last bit


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_decoding_undoes_encoding(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(FLOATS)))
    shape = data.draw(
        st.sampled_from([(), (1,), (0, 4), (300,), (1, 90), (40, 1), (9, 70), (30, 1, 3, 3), (6, 5, 3, 3), (4, 300)])
    )
    bits = data.draw(st.integers(1, 8))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = shape[0] if shape else 1
    width = math.prod(shape) // max(1, rows)
    group = data.draw(st.sampled_from([1, 32, 64, 128, width or 1]))
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1, size=(rows, width))
    powers = data.draw(st.sampled_from([(-3, 3), (-6, -2), (-120, 90), (-150, -100), (90, 120)]))
    significand = data.draw(st.sampled_from([1, {"float32": 16, "float16": 3, "bfloat16": 1}[dtype], 20]))
    count = -(-width // group)
    fine = generator.integers(1, 2**significand, (rows, count)) * np.exp2(generator.integers(*powers, (rows, count)))
    values = (codes * np.repeat(fine, group, axis=1)[:, :width]).reshape(shape)
    flat = values.reshape(-1)
    special = data.draw(st.sampled_from([None, 0.0, -0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 1e38]))
    if special is not None and flat.size:
        flat[generator.integers(0, flat.size, 1 + flat.size // 20)] = special
    if rows and data.draw(st.booleans()):
        values.reshape(rows, -1)[generator.integers(rows)] = 0
    tensor = torch.from_numpy(np.asarray(values)).to(FLOATS[dtype])
    part = encode(tensor)
    if part is not None:
        decoded = decode(part, tensor)
        assert decoded.dtype == to_bits(tensor).dtype
        assert np.array_equal(decoded, to_bits(tensor))
        assert len(part) < tensor.nbytes


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_type_and_width_is_coded(dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (20, 150), generator=generator) + (bits == 1) * 0.5
    sizes = torch.exp2(torch.randint(-6, 3, (20, 1), generator=generator))  # exact in every type
    coded((codes * sizes).to(dtype))


@pytest.mark.parametrize(
    "change",
    {
        "zero rows": lambda rows: rows.__setitem__((slice(3, 9),), 0.0),
        "constant rows": lambda rows: rows.__setitem__((slice(3, 9),), 0.375),
        "one symbol": lambda rows: rows.copy_(rows[:, :1].abs().expand_as(rows)),
        "minus zero": lambda rows: rows.__setitem__((rows.abs() < rows.abs().median()), -0.0),
        "both zeros": lambda rows: rows.mul_(torch.arange(rows.shape[1]) % 2),
        "all of one sign": lambda rows: rows.abs_().neg_(),
        "far apart": lambda rows: rows.mul_(torch.exp2(torch.linspace(-60, 60, len(rows)).round())[:, None]),
    }.items(),
    ids=lambda item: item[0],
)
def test_odd_rows_come_back_bit_by_bit(change: Any) -> None:
    weight = quantized((32, 160), 4)[0]
    change[1](weight)
    coded(weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-40, -1e-45, 1e38], ids=str)
def test_one_value_that_is_no_multiple_makes_a_tensor_fall_back(value: float, tmp_path: Path) -> None:
    weight = quantized((64, 576), 8)[0]
    weight[40, 200] = value
    assert encode(weight) is None
    path = file_of(weight, tmp_path)
    assert artifact.inspect(path)[0].coding in ("codebook", "planes")
    back = rarefy.load(path, base=holding(weight)).t
    assert np.array_equal(to_bits(back), to_bits(weight))


@pytest.mark.parametrize("pattern", [0x7D01, 0xFF81, 0x7F81])
def test_signalling_nans_of_half_precision_are_left_alone(pattern: int) -> None:
    bits = np.tile(np.array([pattern, 0, 1], "<u2"), 50)
    for dtype in ("float16", "bfloat16"):
        part = steps.encode(bits, dtype, (150,))
        assert part is None or np.array_equal(steps.decode(part, dtype, (150,)), bits)


def test_flushing_subnormals_changes_nothing() -> None:
    """The least step is a normal float32, whatever the state of the processor."""
    least = torch.arange(-100, 100).repeat(10) * 2.0**-126
    half = torch.tensor([-3, 0, 1, 2] * 100).to(torch.float16) * 2.0**-24
    torch.set_flush_denormal(True)
    try:
        coded(least)
        coded(half)
    finally:
        torch.set_flush_denormal(False)
    assert encode(least / 2) is None


def test_the_coding_is_fixed_for_good() -> None:
    """Files outlive versions: these bytes must never change."""
    codes = torch.tensor([[1, -2, 3, 0, 1, 1, -1, 0, 1], [0, 0, 1, 0, -1, 0, 0, 0, 1], [3, 3, 3, 3, -3, 3, 3, 2, 0]])
    rows = (codes * torch.tensor([[1.0], [0.3671875], [0.01171875]])).repeat(1, 3)
    assert np.array_equal(decode(bytes.fromhex(GOLDEN), rows), to_bits(rows))
    assert np.array_equal(decode(bytes.fromhex(LEARNT_GOLDEN), rows), to_bits(rows))
    assert encode(rows) == bytes.fromhex(PRUNED_GOLDEN)
    assert np.array_equal(decode(bytes.fromhex(PRUNED_GOLDEN), rows), to_bits(rows))


# Sizes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_the_size_is_the_entropy_of_the_codes_and_the_steps(bits: int, group: int | None) -> None:
    weight, codes, sizes = quantized((256, 1152), bits, group)
    assert len(coded(weight)) < 1.01 * (entropy(codes) + 4 * sizes.size)
    assert len(coded(weight)) < 1.01 * (entropy(codes) + 3 * sizes.size)  # 16 significant bits leave a byte 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dense_tensors_have_no_steps(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for shape in [(3000,), (1,), (), (64, 1), (300, 1, 3, 3), (40, 20, 3, 3), (3, 700)]:
        weight = torch.randn(shape).to(dtype)
        assert encode(weight) is None
    row = artifact.inspect(file_of(torch.randn(50, 70), tmp_path))[0]
    assert row.coding == "planes"
    assert row.bits_per_element < 29  # the exponents of Gaussian numbers have about 2 bits


def test_pruned_dense_tensors_are_not_mistaken_for_multiples() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 576)
    assert encode(weight * (weight > weight.flatten().quantile(0.98))) is None


def test_other_types_have_no_steps() -> None:
    for dtype in (torch.float64, torch.int32, torch.int16):
        assert encode(torch.arange(-99, 99).repeat(10).to(dtype)) is None


def test_a_file_takes_the_smallest_coding(tmp_path: Path) -> None:
    by_row = quantized((64, 576), 4)[0]
    few = torch.tensor([0.1, 0.7, 0.33])[torch.arange(5000) % 3]
    for tensor, coding in [(by_row, "steps"), (few, "codebook"), (torch.randn(64), "planes"), (torch.randn(3), "raw")]:
        path = file_of(tensor, tmp_path)
        row = artifact.inspect(path)[0]
        width = row_width(tuple(tensor.shape))
        parts = [encode(tensor), symbols.section(to_bits(tensor), width), b" " * tensor.nbytes]
        assert row.coding == coding
        assert row.bytes == min(len(part) for part in parts if part is not None)
        assert np.array_equal(to_bits(rarefy.load(path, base=holding(tensor)).t), to_bits(tensor))


# Parts that are not sound


def head(form: int, zigzag: int) -> bytes:
    return bytes([form]) + varint(zigzag)


def step(*numbers: float, dtype: str = "<f4") -> bytes:
    return measured(b"\0" + np.array(numbers, dtype).tobytes())


ONE = step(1)
PRUNED = pruned.encode(np.array([0, 2, 0, -2], np.int32), 1) or b""


def test_a_part_made_by_hand_is_decoded() -> None:
    part = head(0, 0) + ONE + bytes([0, 0, 1, 2, 1])
    assert steps.decode(part, "float32", (4,)).view("<f4").tolist() == [0, 1, 2, 1]
    part = head(8, 1) + ONE + bytes([0, 0, 1, 2, 1])
    assert steps.decode(part, "float32", (4,)).tolist() == [1 << 31, 0, 0x3F800000, 0]
    part = head(1, 3) + step(1, 0.5) + bytes([0, 0, 1, 2, 1])
    assert steps.decode(part, "float32", (2, 2)).view("<f4").tolist() == [-2, -1, 0, -0.5]
    for part in (bytes([32]) + step(0.5)[2:], bytes([96]) + step(0.5)[3:]):
        assert steps.decode(part + PRUNED, "float32", (4,)).view("<f4").tolist() == [0, 1, 0, -1]
    part = bytes([33]) + step(0.5, 3) + (pruned.encode(np.array([0, 2, 0, -2], np.int32), 2) or b"")
    assert steps.decode(part, "float32", (2, 2)).view("<f4").tolist() == [0, 1, 0, -6]


@pytest.mark.parametrize(
    "part",
    [
        b"",
        bytes([0]),
        head(2, 0) + ONE + bytes(5),
        head(7, 0) + ONE + bytes(5),
        *(bytes([form]) + step(1)[2:] + PRUNED for form in (40, 48, 64, 72, 96 + 5, 128, 160)),
        bytes([32]) + step(1)[2:-1],
        bytes([32]) + step(0)[2:] + PRUNED,
        bytes([96]) + step(math.nan)[3:] + PRUNED,
        bytes([32]) + step(1)[2:] + PRUNED[:-1],
        bytes([32]) + step(1)[2:] + varint(5) + PRUNED[1:],
        bytes([32]) + step(3e38)[2:] + PRUNED,
        head(255, 0) + ONE + bytes(5),
        head(0, 0) + step(1, 1) + bytes(5),
        head(0, 0) + step(1, dtype="<f2") + bytes(5),
        head(16, 0) + ONE + bytes(5),
        head(0, 0) + ONE,
        head(0, 0) + ONE + bytes(4),
        head(0, 0) + ONE + bytes(6),
        head(0, 0) + ONE + b"\6" + bytes(4),
        head(0, 0) + varint(2**50) + ONE[1:] + bytes(5),
        head(0, 0) + varint(4) + ONE[1:] + bytes(5),
        head(0, 2 * 32767) + ONE + bytes([0, 0, 1, 0, 0]),
        head(0, 2 * 32768 - 1) + ONE + bytes([0, 0, 1, 0, 0]),
        head(0, 2**62) + ONE + bytes(5),
        head(0, 2**62 - 1) + ONE + bytes(5),
        *(head(0, 0) + step(bad) + bytes(5) for bad in (0, -0.0, -1, math.inf, math.nan, 1e-40, -1e-40)),
        head(0, 0) + step(3e38) + bytes([0, 0, 1, 2, 1]),
        head(0, 0) + step(1 + 2**-23) + bytes([0, 0, 1, 3, 1]),
    ],
)
def test_parts_that_no_encoder_writes_are_refused(part: bytes) -> None:
    with pytest.raises(ArtifactError):
        steps.decode(part, "float32", (4,))


@pytest.mark.parametrize(("dtype", "number"), [("float16", 2.0**15), ("float16", 1 + 2.0**-10)])
def test_products_that_the_type_lacks_are_refused(dtype: str, number: float) -> None:
    start = head(0, 0) + step(number, dtype="<f2")
    with pytest.raises(ArtifactError, match="no float16"):
        steps.decode(start + bytes([0, 0, 1, 3, 1]), dtype, (4,))
    assert steps.decode(start + bytes([0, 0, 1, 0, 1]), dtype, (4,)).size == 4


def test_a_type_without_steps_is_refused() -> None:
    for dtype in ("float64", "int32", "bool"):
        with pytest.raises(ArtifactError, match=f"{dtype} has no steps"):
            steps.decode(coded(quantized((8, 64), 4)[0]), dtype, (512,))


def test_a_wrong_number_of_elements_is_refused() -> None:
    weight = quantized((8, 64), 4)[0]
    part = coded(weight)
    for size in (0, 1, 64, 511, 513, 1024):
        with pytest.raises(ArtifactError):
            steps.decode(part, "float32", (size,))


def test_a_truncated_part_is_refused_or_gives_other_finite_numbers() -> None:
    """The range coder cannot tell that its last words are missing; the length and hash in the manifest do."""
    by_row, by_group = quantized((8, 64), 4)[0], quantized((2, 96), 8, 32)[0]
    for weight, plain in ((by_row, False), (by_group, True)):
        part = coded(weight)
        refused = 0
        for length in range(len(part)):
            try:
                back = decode(part[:length], weight)
            except ArtifactError:
                refused += 1
            else:
                assert np.isfinite(back.view("<f4")).all()
        assert refused == len(part) if plain else refused > len(part) * 0.9


def test_a_flipped_bit_gives_other_finite_numbers_or_is_refused() -> None:
    weight = quantized((8, 64), 4)[0]
    part = coded(weight)
    for position in range(8 * len(part)):
        flipped = bytearray(part)
        flipped[position // 8] ^= 1 << position % 8
        try:
            back = decode(flipped, weight)
        except ArtifactError:
            continue
        assert back.shape == (512,)
        assert np.isfinite(back.view("<f4")).all()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_decode_to_the_right_number_of_elements_or_are_refused(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 300))
    dtype = data.draw(st.sampled_from(list(FLOATS)))
    start = data.draw(st.sampled_from([b"", head(0, 0), head(0, 0) + ONE, bytes([32]) + step(1)[2:], b"\x21"]))
    try:
        decoded = steps.decode(start + data.draw(st.binary(max_size=60)), dtype, (size,))
    except ArtifactError:
        return
    assert decoded.shape == (size,)


def test_a_short_part_takes_no_memory_for_what_it_claims() -> None:
    size = 2**28
    tracemalloc.start()
    try:
        for form, shape in ((0, (size,)), (1, (size // 2, 2)), (2, (size,))):
            with pytest.raises(ArtifactError):
                steps.decode(head(form, 0) + ONE + bytes(5), "float32", shape)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
