"""ONNX files with 4-bit weights of linear layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rarefy.errors import StageError
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.execution.config import OnnxInt4Format
from torch import nn

from .conftest import quantized, random_task, written

QUICK = OnnxInt4Format(rounds=3, max_error=10)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 4)
    )


def test_products_become_four_bits_and_the_file_gets_smaller(tmp_path: Path) -> None:
    file = written(network(), random_task(2, 8, 8), QUICK, tmp_path)
    assert file.operators()["MatMulNBits"] == 3
    assert not {"Gemm", "MatMul"} & set(file.operators())
    assert file.value("float32_rate") > 5
    assert file.report.bytes < 100_000 * 5 / 8 + 8_000
    assert file.value("output_error") < 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group", "group_size": 32},
        {"granularity": "group", "group_size": 64, "symmetric": False},
        {"granularity": "channel"},
        {"granularity": "tensor", "bits": 3},
    ],
)
def test_codes_that_a_step_left_are_multiplied_as_they_are(options: dict[str, object], tmp_path: Path) -> None:
    model = quantized(network(), UniformConfig(**{"bits": 4, **options}))
    file = written(model, random_task(2, 8, 8), QUICK, tmp_path)
    assert "3 of 3 weights consisted of 4-bit codes" in file.report.notes[0]
    assert file.value("output_error") < 0.03  # what is left is the rounding of activations inside the kernel


def test_convolutions_stay_in_float_and_exclusion_holds(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 64), nn.Linear(64, 4))
    file = written(model, random_task(2, 8, 8), QUICK.model_copy(update={"exclude": ("3",)}), tmp_path)
    assert [file.operators()[name] for name in ("Conv", "Gemm", "MatMulNBits")] == [1, 1, 1]
    with pytest.raises(StageError, match=r"nothing to quantize: no Gemm or MatMul.*Conv"):
        written(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()), random_task(2, 8, 8), QUICK, tmp_path / "no")


def test_sequences_are_multiplied_too(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(40, 64), nn.Linear(64, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.inner(x))).mean(1)

    file = written(Words(), random_task(5, 40), QUICK, tmp_path)
    assert file.operators()["MatMulNBits"] == 2
    assert file.value("output_error") < 0.3
    weight = [value for value in file.constants.values() if value.dtype == np.uint8]
    assert sorted(value.shape for value in weight) == [(4, 2, 16), (64, 2, 16)]
