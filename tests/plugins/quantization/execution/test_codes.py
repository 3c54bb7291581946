"""The integers that a weight consists of, or is rounded to."""

from __future__ import annotations

import numpy as np
import pytest
from rarefy_quantization.execution.blocks import blocks_of
from rarefy_quantization.execution.codes import row_codes

STEPS = np.float32([0.5, 0.25, 3.0, 0.0078125])


def grid(low: int, high: int, width: int = 40) -> np.ndarray:
    """Return random codes whose rows have no common divisor."""
    codes = np.random.default_rng(0).integers(low, high, (4, width), endpoint=True).astype(np.float32)
    codes[:, :2] = 1, 2
    return codes


class TestRowCodes:
    def test_rows_on_grids_keep_their_integers_and_steps(self) -> None:
        codes = grid(-128, 127)
        found = row_codes(codes * STEPS[:, None])
        assert found.found
        assert found.codes.dtype == np.int8
        assert (found.codes == codes).all()
        assert (found.scales == STEPS).all()

    def test_other_rows_are_rounded_to_the_range_of_each(self) -> None:
        rows = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32) * STEPS[:, None]
        found = row_codes(rows)
        assert not found.found
        error = np.abs(found.codes * found.scales[:, None] - rows)
        assert (error <= 0.51 * found.scales[:, None]).all()
        assert (np.abs(found.codes.astype(int)).max(1) >= 127).all()

    def test_a_grid_of_more_than_256_values_is_rounded(self) -> None:
        assert not row_codes(grid(-300, 300) * STEPS[:, None]).found

    def test_rows_times_a_number_each_keep_the_integers_with_its_sign(self) -> None:
        codes, factors = grid(-127, 127), np.float32([1.234567, -0.1, 0.0, 7.7])
        before = codes * STEPS[:, None]
        found = row_codes(before * factors[:, None], before)
        assert found.found
        assert (found.codes == codes * np.sign(factors)[:, None]).all()
        assert found.scales[[0, 1, 3]] == pytest.approx((STEPS * np.abs(factors))[[0, 1, 3]])

    def test_a_row_whose_negative_has_no_code_is_rounded_and_the_others_keep_theirs(self) -> None:
        codes, factors = grid(-127, 127), np.float32([-1.1, -0.3, 0.7, 0.7])
        codes[0, 3] = -128
        before = codes * STEPS[:, None]
        rows = before * factors[:, None]
        found = row_codes(rows, before)
        assert not found.found
        assert (found.codes[1:] == (codes * np.sign(factors)[:, None])[1:]).all()
        assert (np.abs(found.codes[0] * found.scales[0] - rows[0]) <= 0.51 * found.scales[0]).all()

    def test_rows_that_are_no_multiples_of_those_before_are_rounded(self) -> None:
        before = grid(-127, 127)
        assert not row_codes(before + np.float32(np.pi), before).found

    @pytest.mark.parametrize("rows", [np.zeros((3, 5)), np.full((3, 1), 0.3), np.full((2, 5), 1e-38)])
    def test_rows_of_zeros_and_of_one_value_have_codes(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float32)
        found = row_codes(rows)
        assert (found.scales > 0).all()
        assert found.codes * found.scales[:, None] == pytest.approx(rows, rel=0.01, abs=1e-30)


class TestBlocks:
    def decoded(self, rows: np.ndarray, size: int = 32) -> np.ndarray:
        blocks = blocks_of(rows, size)
        packed = blocks.packed()
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(blocks.codes.shape)
        zeros = blocks.packed_zeros().reshape(len(rows), -1)
        zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(rows), -1)[:, : blocks.codes.shape[1]]
        values = (codes.astype(np.float32) - zeros[:, :, None]) * blocks.scales[:, :, None]
        return values.reshape(len(rows), -1)[:, : rows.shape[1]]

    @pytest.mark.parametrize("low", [-8, 0, -15, -3])
    @pytest.mark.parametrize("width", [40, 96, 128, 300])
    def test_rows_on_grids_of_16_values_come_back_bit_for_bit(self, low: int, width: int) -> None:
        rows = grid(low, low + 15, width)
        rows[:, :2] = rows[:, 2:4] = max(low, -1) or 1, low + 15
        rows *= STEPS[:, None]
        assert blocks_of(rows, 32).found
        assert (self.decoded(rows) == rows).all()

    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_groups_keep_their_steps(self, group: int) -> None:
        powers = np.random.default_rng(1).integers(-9, 9, (4, 3)).repeat(group, 1)[:, : 2 * group + 9]
        steps = np.exp2(powers).astype(np.float32)
        rows = grid(-8, 7, 2 * group + 9) * steps
        rows[:, ::group] = steps[:, ::group] * 7  # odd, so that each group has the step that it was given
        found = blocks_of(rows, 32)
        assert found.found
        assert found.size == group
        assert (self.decoded(rows) == rows).all()

    def test_other_rows_are_rounded_block_by_block(self) -> None:
        rows = np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32)
        found = blocks_of(rows, 32)
        assert not found.found
        assert found.scales.shape == (3, 3)
        scales = found.scales.repeat(32, 1)[:, :70]
        assert (np.abs(self.decoded(rows) - rows) <= 0.51 * scales).all()
