"""Evenly spaced values: by hand, exact in float32, with zero among them, per layer, channel and group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.grids import Grid, Units, round_step
from rarefy_quantization.ranges import SHRINK, fit_grid, least_divergence


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def between(least: float, most: float, bits: int, symmetric: bool) -> Grid:
    return Grid.between(row(least), row(most), bits, symmetric)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def significant_bits(x: float) -> int:
    numerator = abs(x.as_integer_ratio()[0])
    return (numerator // (numerator & -numerator)).bit_length()


class TestSteps:
    def test_known_values(self) -> None:
        exact = torch.tensor([1.0, 0.5, 65535.0, 1.0 + 2**-15])
        assert torch.equal(round_step(exact), exact)
        assert round_step(torch.tensor([1.0 + 2**-15 + 2**-17])).tolist() == [1.0 + 2**-15]
        assert round_step(torch.tensor([131071.0])).tolist() == [131072.0]
        assert round_step(torch.tensor([0.0])).tolist() == [0.0]

    def test_sixteen_bits_are_left_and_half_a_unit_in_the_last_is_lost(self) -> None:
        steps = normal(2000).abs() * 10.0 ** (normal(2000, seed=1) * 5)
        rounded = round_step(steps)
        assert max(significant_bits(x) for x in rounded.tolist()) == 16
        assert ((rounded.double() / steps.double() - 1).abs() <= 2.0**-16).all()

    def test_the_smallest_floats_stay_positive(self) -> None:
        tiny = torch.tensor([2.0**-149, 3 * 2.0**-149, 2.0**-130])
        assert torch.equal(round_step(tiny), tiny)

    def test_products_with_codes_are_exact_in_float32(self) -> None:
        steps = round_step(normal(300).abs() + 1e-3)
        codes = torch.arange(-255.0, 256.0)
        products = steps[:, None] * codes
        assert torch.equal(products.double(), steps.double()[:, None] * codes.double())


class TestGrid:
    def test_symmetric_by_hand(self) -> None:
        grid = between(-1.0, 1.5, 3, True)
        assert (grid.step.item(), grid.low.item(), grid.high.item()) == (0.5, -4, 3)
        units = row(-3.0, -1.1, -0.3, -0.2, 0.0, 0.25, 0.75, 0.8, 9.0)
        assert grid.codes(units).tolist() == [[-4, -2, -1, 0, 0, 0, 2, 2, 3]]
        assert grid.snap(units).tolist() == [[-2.0, -1.0, -0.5, 0, 0, 0, 1.0, 1.0, 1.5]]
        assert grid.error(row(-3.0, 0.2)).item() == pytest.approx(1.04)

    def test_the_end_that_needs_more_decides(self) -> None:
        assert between(-4.0, 1.5, 3, True).step.item() == 1.0

    def test_affine_by_hand(self) -> None:
        grid = between(-1.0, 2.5, 3, False)
        assert (grid.step.item(), grid.low.item(), grid.high.item()) == (0.5, -2, 5)
        assert grid.snap(row(-5.0, -0.6, 0.0, 2.3, 7.0)).tolist() == [[-1.0, -0.5, 0.0, 2.5, 2.5]]
        assert (between(0.0, 3.5, 3, False).low.item(), between(-3.5, 0.0, 3, False).high.item()) == (0, 0)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_it_has_so_many_values_and_none_is_farther_than_half_a_step(self, bits: int, symmetric: bool) -> None:
        units = normal(20, 3000)
        grid = Grid.between(units.amin(1, keepdim=True), units.amax(1, keepdim=True), bits, symmetric)
        assert (grid.high - grid.low + 1 == 2**bits).all()
        assert ((grid.low <= 0) & (grid.high >= 0)).all()
        far = ((grid.snap(units) - units).abs() / grid.step).max().item()
        # an affine zero point is rounded, and a step may have been, each by its half
        assert far <= (0.51 if symmetric else 1.01)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_zeros_and_constant_units(self, symmetric: bool) -> None:
        units = torch.tensor([[0.0, 0.0, 0.0], [0.7, 0.7, 0.7], [-0.7, 0.0, -0.7]])
        grid = fit_grid(units, 4, UniformConfig(range="min-max", symmetric=symmetric))
        assert torch.isfinite(grid.step).all()
        assert grid.step[0].item() == 1
        assert torch.equal(grid.snap(units) == 0, units == 0)
        torch.testing.assert_close(grid.snap(units), units, rtol=2.0**-15, atol=0)


class TestUnits:
    @pytest.mark.parametrize(
        ("shape", "granularity", "size", "count"),
        [
            ((6, 100), "tensor", 600, 1),
            ((6, 100), "channel", 100, 6),
            ((6, 100), "group", 32, 24),
            ((6, 64), "group", 32, 12),
            ((6, 5), "group", 5, 6),
            ((4, 3, 5, 5), "channel", 75, 4),
            ((4, 3, 5, 5), "group", 32, 12),
        ],
    )
    def test_splitting_and_joining(self, shape: tuple[int, ...], granularity: str, size: int, count: int) -> None:
        weight = normal(*shape)
        units = Units.of(weight.shape, granularity, 32)
        split = units.split(weight)
        assert split.shape == (count, size)
        assert units.count == count
        assert torch.equal(units.join(split), weight)

    def test_groups_are_consecutive_weights_of_a_row(self) -> None:
        weight = torch.arange(140.0).view(2, 70)
        split = Units.of(weight.shape, "group", 32).split(weight)
        assert split[1].tolist() == list(range(32, 64))
        assert split[2].tolist() == [*range(64, 70), *[0] * 26]
        assert split[3, 0] == 70


class TestRanges:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", [2, 3, 5, 8])
    def test_mse_is_the_best_of_a_scan_in_numpy(self, bits: int, symmetric: bool) -> None:
        units = normal(3, 200) * torch.tensor([[1.0], [0.01], [30.0]]) + torch.tensor([[0.0], [0.005], [0.0]])
        grid = fit_grid(units, bits, UniformConfig(range="mse", symmetric=symmetric))
        codes = 2**bits
        for number, values in enumerate(units.double().numpy()):
            least, most = min(values.min(), 0), max(values.max(), 0)
            errors = []
            for share in SHRINK:
                if symmetric:
                    low, high = -codes // 2, codes // 2 - 1
                    step = max(share * least / low, share * most / high)
                else:
                    step = share * (most - least) / (codes - 1)
                    low = np.round(share * least / step)
                    high = low + codes - 1
                errors.append(((np.clip(np.round(values / step), low, high) * step - values) ** 2).sum())
            ours = grid.error(units)[number].item()
            assert ours == pytest.approx(min(errors), rel=2e-3)
            assert ours <= Grid.between(*(torch.tensor([[x]]) for x in (least, most)), bits, symmetric).error(
                units[number : number + 1]
            )

    def test_mse_clips_a_normal_distribution_where_it_is_known_to_be_best(self) -> None:
        # the best step for 16 even levels is 0.3352 sigma (Max 1960), and zero is a level here instead of between two
        grid = fit_grid(normal(1, 100_000), 4, UniformConfig(range="mse"))
        assert grid.step.item() == pytest.approx(0.335, abs=0.02)

    def test_min_max_reaches_all(self) -> None:
        units = normal(5, 64)
        grid = fit_grid(units, 8, UniformConfig(range="min-max"))
        steps = torch.maximum(units.amax(1) / 127, units.amin(1) / -128)
        torch.testing.assert_close(grid.step.flatten(), steps, rtol=2.0**-16, atol=0)

    def test_percentile_leaves_out_the_ends_and_does_not_count_zeros(self) -> None:
        values = torch.cat([torch.arange(1.0, 101.0), -torch.arange(1.0, 101.0)])
        shuffled = values[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
        units = torch.stack([torch.cat([shuffled, torch.zeros(300)]), torch.zeros(500)])
        grid = fit_grid(units, 8, UniformConfig(range="percentile", percentile=95, symmetric=False))
        # of 200 ascending values the places round(0.05 * 199) and round(0.95 * 199)
        assert grid.step[0].item() == pytest.approx((90.0 + 90.0) / 255, rel=1e-4)
        assert grid.step[1].item() == 1
        whole = fit_grid(units, 8, UniformConfig(range="percentile", percentile=100))
        assert torch.equal(whole.step, fit_grid(units, 8, UniformConfig(range="min-max")).step)

    def test_entropy_is_the_best_of_all_divergences(self) -> None:
        magnitudes = normal(1600).abs()
        magnitudes /= magnitudes.max()
        bins, levels = 100, 8
        counts = np.histogram(magnitudes.double().numpy(), bins, (0, 1))[0].astype(float)
        divergences = {}
        for inside in range(levels, bins + 1):
            p = counts[:inside].copy()
            p[-1] += counts[inside:].sum()
            q = np.zeros(inside)
            cells = np.round((np.arange(inside) + 0.5) / inside * (levels - 1))
            for cell in range(levels):
                members = (cells == cell) & (p > 0)
                q[members] = counts[:inside][cells == cell].sum() / max(members.sum(), 1)
            q[(p > 0) & (q == 0)] = 0.5
            p, q = p / p.sum(), q / q.sum()
            divergences[inside] = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        best = min(divergences, key=lambda inside: divergences[inside])
        assert least_divergence(magnitudes, levels) == pytest.approx(best / bins)
        assert best < bins

    def test_entropy_clips_outliers_and_keeps_evenly_spread_weights(self) -> None:
        config = UniformConfig(range="entropy", bits=4)
        assert fit_grid(torch.linspace(-1, 1, 4000)[None], 4, config).step.item() == pytest.approx(1 / 7, rel=0.15)
        outliers = torch.cat([normal(4000), torch.tensor([20.0, -20.0])])
        assert 1.5 < 7 * fit_grid(outliers[None], 4, config).step.item() < 5

    def test_entropy_takes_the_whole_range_of_few_weights(self) -> None:
        units = normal(1, 100)
        whole, ours = (fit_grid(units, 4, UniformConfig(range=r)) for r in ("min-max", "entropy"))
        assert torch.equal(whole.step, ours.step)


def test_no_negative_zeros_are_left() -> None:
    grid = Grid.between(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 4, symmetric=True)
    assert not torch.signbit(grid.snap(torch.tensor([[-0.01, -0.0]]))).any()
