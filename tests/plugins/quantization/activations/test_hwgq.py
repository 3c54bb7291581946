"""HWGQ: levels against published ones and numerical integration, both gradients, and training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rarefy import artifact
from rarefy.errors import StageError
from rarefy.modules import as_base
from rarefy.nouns import implement
from rarefy.training import fit
from rarefy_quantization.activations.config import HwgqConfig
from rarefy_quantization.activations.half_wave import HalfWave, half_gaussian_levels
from rarefy_schemas import Finetune
from torch import nn


def error(levels: tuple[float, ...]) -> float:
    """Return the mean squared error for the positive half of a normal distribution, by integration."""
    x = np.linspace(0, 10, 200_001)
    density = np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2)
    nearest = np.abs(x[:, None] - np.array(levels)).min(1)
    return float((nearest**2 * density).sum() * (x[1] - x[0]))


class TestLevels:
    def test_they_are_those_of_the_paper_and_of_max(self) -> None:
        assert half_gaussian_levels(3, True)[0] == pytest.approx(0.538, abs=1e-3)
        assert half_gaussian_levels(1, True)[0] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-5)
        # Max 1960, the quantizer of a normal distribution with 6 levels
        assert half_gaussian_levels(3, False) == pytest.approx((0.3177, 1.000, 1.894), abs=1e-3)

    @pytest.mark.parametrize("count", [1, 3, 7, 15])
    def test_the_uniform_step_is_the_best(self, count: int) -> None:
        step = half_gaussian_levels(count, True)[0]
        best = error(half_gaussian_levels(count, True))
        for other in (0.97 * step, 1.03 * step):
            assert error(tuple(other * number for number in range(1, count + 1))) > best
        assert error(half_gaussian_levels(count, False)) <= best + 1e-9

    def test_they_are_spaced_evenly(self) -> None:
        assert np.diff((0.0, *half_gaussian_levels(7, True))) == pytest.approx(half_gaussian_levels(7, True)[0])


class TestActivation:
    def test_what_is_above_zero_gets_the_nearest_level_above_zero(self) -> None:
        d = half_gaussian_levels(3, True)[0]
        x = torch.tensor([-2.0, 0.0, 0.01, 1.4 * d, 1.6 * d, 2.6 * d, 50.0])
        expected = torch.tensor([0, 0, d, d, 2 * d, 3 * d, 3 * d])
        torch.testing.assert_close(HalfWave(2)(x), expected)
        torch.testing.assert_close(HalfWave(2, sigma=2.0)(2 * x), 2 * expected)

    def test_gradients_beyond_the_largest_level_end_or_fall_off(self) -> None:
        q = half_gaussian_levels(3, True)[-1]
        for log_tailed, last in ((False, 0.0), (True, 1 / 4)):
            x = torch.tensor([-1.0, 0.3, q - 0.1, q + 3], requires_grad=True)
            HalfWave(2, log_tailed=log_tailed)(x).sum().backward()
            assert x.grad is not None
            assert x.grad.tolist() == pytest.approx([0, 1, 1, last])

    def test_sigma_does_not_change_the_gradient_of_what_is_not_clipped(self) -> None:
        x = torch.tensor([0.5], requires_grad=True)
        HalfWave(2, sigma=3.0)(x).backward()
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(1.0)

    def test_it_is_exported_with_its_levels(self) -> None:
        model, x = nn.Sequential(nn.Linear(3, 4), HalfWave(2, uniform=False)).eval(), torch.randn(5, 3)
        exported = torch.export.export(model, (x,)).module()
        assert torch.equal(exported(x), model(x))

    def test_bits_out_of_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="from 1 to 8 bits"):
            HalfWave(9)
        with pytest.raises(ValidationError, match="bits"):
            HwgqConfig(bits=9)


@pytest.fixture(scope="module")
def normed(digits_task: Any) -> nn.Module:
    """Return a network with batch norms before its ReLUs, trained on digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.BatchNorm1d(64),
        nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    fit(model, model, digits_task, Finetune(epochs=4, lr=3e-3))
    return model.eval()


class TestModels:
    def test_relus_are_replaced_and_scaled_by_what_passes_them(
        self, digits_task: Any, trained_digits: nn.Module, quantized: Any
    ) -> None:
        changed = quantized(trained_digits, HwgqConfig(), digits_task)
        names = ("relu1", "relu2", "relu3")
        assert all(type(changed.get_submodule(name)) is HalfWave for name in names)
        passed = torch.cat([trained_digits.conv1(*inputs) for inputs in digits_task.calibration(batches=4)])
        root = float(passed[passed > 0].square().mean().sqrt().detach())
        assert changed.relu1.sigma == pytest.approx(root, rel=1e-5)
        one = quantized(trained_digits, HwgqConfig(sigma="one"), digits_task)
        assert one.relu1.sigma == 1.0

    @pytest.mark.parametrize("options", [{}, {"levels": "free", "backward": "log-tailed"}])
    def test_digits_and_the_file(
        self, options: dict[str, Any], digits_task: Any, normed: nn.Module, quantized: Any, tmp_path: Path
    ) -> None:
        config = HwgqConfig(finetune=Finetune(epochs=4, lr=3e-3), **options)
        changed = quantized(normed, config, digits_task)
        assert digits_task.score(changed, "test") > digits_task.score(normed, "test") - 0.03
        assert all(len(row.unique()) == 2 for row in changed[8].weight.detach())
        given = changed[:3](digits_task.example_inputs(8)[0])
        assert given.unique().numel() <= 4
        artifact.write(changed, as_base(normed), tmp_path / "model.rarefy")
        again = artifact.load(tmp_path / "model.rarefy", base=as_base(normed).build).eval()
        x = digits_task.example_inputs(4)
        torch.testing.assert_close(again(*x), changed(*x))

    def test_a_network_without_relus_is_an_error(self, digits_task: Any) -> None:
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 10)
        )
        with pytest.raises(StageError, match=r"no nn\.ReLU module"):
            implement(HwgqConfig()).analyze(model, digits_task)
