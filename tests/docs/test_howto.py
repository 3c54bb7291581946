"""The how-tos do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rarefy.artifact import write
from rarefy.modules import as_base
from rarefy.zoo import lenet5

PAGE = Path(__file__).parents[2] / "docs" / "howto.md"


def test_the_example_of_integer_kernels_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r'^```python title="integer_kernels.py"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    model = lenet5()
    write(model, as_base(model), tmp_path / "model.rarefy")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(found[1], "integer_kernels.py", "exec"), names)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["model", *layers]
    assert all(re.match(r"[\w.]+: (int8|float32): ", line) for line in printed)
    assert isinstance(names["outputs"], torch.Tensor)
    assert names["outputs"].shape == (64, 10)
