"""Fewer significant bits: what is rounded and what not, exactness, the file, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy import compress
from rarefy.artifact import inspect
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy_quantization.config import UniformConfig
from rarefy_quantization.rounding.config import PrecisionConfig
from rarefy_quantization.rounding.precision import rounded
from torch import nn

NO_TASK: Any = None


def changed(model: nn.Module, config: Any) -> nn.Module:
    technique = implement(config)
    return technique.consolidate(technique.transform(copy.deepcopy(model), technique.analyze(model, NO_TASK), NO_TASK))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 32)).eval()


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (11, torch.float16)])
def test_rounding_is_that_of_the_types_with_so_many_bits(bits: int, dtype: torch.dtype) -> None:
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(numbers, bits), numbers.to(dtype).float())
    assert torch.equal(rounded(numbers, 24), numbers)
    assert torch.equal(rounded(torch.tensor([0.0, 1e-42, 3e38]), 24), torch.tensor([0.0, 1e-42, 3e38]))


def test_all_floats_are_rounded_and_multiples_of_steps_are_not() -> None:
    model = changed(network(), UniformConfig(bits=4))
    after = changed(model, PrecisionConfig(bits=8))
    for name, tensor in after.state_dict().items():
        if name in ("0.weight", "3.weight"):
            assert torch.equal(tensor, model.state_dict()[name])
        elif tensor.is_floating_point():
            assert torch.equal(tensor, tensor.bfloat16().float())
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=2**-8, atol=0)


def test_zeros_and_equal_values_stay() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([0.0, 0.1, -0.337])[torch.arange(288 * 32).reshape(32, 288) % 3])
    weight = changed(model, PrecisionConfig())[3].weight
    assert len(weight.unique()) == 3
    assert torch.equal(weight == 0, model[3].weight == 0)


def test_a_file_takes_fewer_bytes(trained_digits: nn.Module, digits_task: Any, tmp_path: Path) -> None:
    sizes = {}
    for bits in (24, 8):
        recipe = {"steps": [{"technique": "quantization/precision", "bits": bits}], "export": [{"format": "rarefy"}]}
        compress(trained_digits, recipe, task=digits_task, directory=tmp_path / str(bits))
        (file,) = (tmp_path / str(bits) / "exports").glob("*.rarefy")
        sizes[bits] = sum(row.bytes for row in inspect(file) if row.dtype == "float32")
    assert sizes[8] < 0.55 * sizes[24]


def test_errors() -> None:
    with pytest.raises(StageError, match="no layer matches"):
        changed(network(), PrecisionConfig(targets={"include": ["nothing"]}))
    broken = network()
    with torch.no_grad():
        broken[1].running_var[2] = torch.inf
    with pytest.raises(StageError, match="layer '1'"):
        changed(broken, PrecisionConfig())
