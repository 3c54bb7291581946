"""Tables of embeddings with 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rarefy.tasks import ClassificationTask
from rarefy_quantization.execution.config import OnnxInt4Format, OnnxInt8Format
from torch import nn

from .conftest import written


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(500, 32), nn.Linear(32, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(tokens).mean(1))


def texts() -> ClassificationTask:
    generator = np.random.default_rng(0)
    return ClassificationTask.from_arrays(generator.integers(0, 500, (96, 7)), generator.integers(0, 4, 96))


@pytest.mark.parametrize("config", [OnnxInt8Format(rounds=3), OnnxInt4Format(rounds=3)])
def test_rows_are_looked_up_among_integers(config: OnnxInt8Format | OnnxInt4Format, tmp_path: Path) -> None:
    model = Text().eval()
    file = written(model, texts(), config, tmp_path)
    codes, scales = (file.constants[f"words.weight/{kind}"] for kind in "qs")
    table = model.words.weight.detach().numpy()
    assert codes.dtype == np.int8
    assert (np.abs(codes * scales - table) <= 0.51 * scales).all()
    assert file.value("output_error") < 0.3
    assert "1 tables of embeddings have 8 bits" in file.report.notes


def test_excluded_tables_stay_in_float(tmp_path: Path) -> None:
    file = written(Text().eval(), texts(), OnnxInt8Format(rounds=3, exclude=("words",)), tmp_path)
    assert file.constants["words.weight"].dtype == np.float32
