"""The how-tos do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import rarefy
import torch
from rarefy.artifact import write
from rarefy.modules import as_base
from rarefy.zoo import lenet5

PAGE = Path(__file__).parents[2] / "docs" / "howto.md"


def run(title: str) -> dict[str, object]:
    """Run a block of the page that has a title; return its names."""
    found = re.search(rf'^```python title="{title}"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    names: dict[str, object] = {}
    exec(compile(found[1], title, "exec"), names)
    return names


def test_the_example_of_integer_kernels_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lenet5()
    write(model, as_base(model), tmp_path / "model.rarefy")
    monkeypatch.chdir(tmp_path)
    names = run("integer_kernels.py")
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["model", *layers]
    assert all(re.match(r"[\w.]+: (int8|float32): ", line) for line in printed)
    assert isinstance(names["outputs"], torch.Tensor)
    assert names["outputs"].shape == (64, 10)


def test_the_example_of_a_training_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("own_loop.py")
    model, sparse = names["model"], names["sparse"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(sparse, torch.nn.Module)
    weights = [parameter for parameter in sparse.parameters() if parameter.dim() > 1]
    assert sum(int(w.count_nonzero()) for w in weights) < 0.11 * sum(w.numel() for w in weights)
    assert sum(w.numel() for w in weights) < 0.7 * sum(p.numel() for p in model.parameters())
    assert (tmp_path / "model.onnx").exists()
    assert rarefy.load(tmp_path / "model.rarefy", base=lenet5)(torch.rand(2, 1, 28, 28)).shape == (2, 10)
