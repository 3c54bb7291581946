"""References lead to models and tasks, or to an error that says what would; weights never run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.errors import RecipeError
from rarefy.references import build_model, build_task
from rarefy_schemas import ModelReference, TaskReference
from safetensors.torch import save_file
from torch import nn

CODE = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3, tied=False):
        super().__init__()
        self.one, self.two = nn.Linear(4, width), nn.Linear(width, 4)
        if tied:
            self.two.weight = nn.Parameter(self.one.weight.T)
            self.two = nn.Linear(4, width)
            self.two.weight = self.one.weight

def build(width=3, tied=False):
    return Net(width, tied)

def fails():
    raise ValueError("no such luck")

def number():
    return 7
"""


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)


def model(source: str, **rest: Any) -> nn.Module:
    return build_model(ModelReference(source=source, **rest), load_weights=True)


def test_the_three_kinds_of_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(model("zoo:lenet5"), nn.Module)
    assert model("./net.py:build", options={"width": 5}).one.out_features == 5
    assert model("net:build").one.out_features == 3
    assert build_task(TaskReference(source="data:digits")).metric == "accuracy"


def test_a_file_gives_the_same_class_every_time() -> None:
    assert type(model("./net.py:build")) is type(model("./net.py:build"))


def test_random_weights_come_from_the_seed_and_disturb_nobody() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (build_model(ModelReference(source="zoo:mlp"), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one[1].weight, same[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zoo:lenet6", "Did you mean 'lenet5'"),
        ("zo:lenet5", "Did you mean 'zoo'"),
        ("lenet5", "is no reference; write SCHEME:NAME"),
        ("data:digits", "has no models, only tasks"),
        ("no_such_package.module:build", "neither a source nor a module"),
        ("./none.py:build", "there is no file none.py in the current folder"),
        ("./net.py:biuld", "Did you mean 'build'"),
        ("./net.py:fails", "failed with ValueError: no such luck"),
        ("./net.py:number", "returned int, not a Module"),
    ],
)
def test_wrong_references(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        model(source)


def test_wrong_options_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no option 'wdith'\. Did you mean 'width'"):
        model("./net.py:build", options={"wdith": 5})
    (tmp_path / "broken.py").write_text("1/0")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        model("./broken.py:build")
    with pytest.raises(RecipeError, match="has no tasks, only models"):
        build_task(TaskReference(source="zoo:lenet5"))


def test_untrusted_references_run_no_code() -> None:
    with pytest.raises(RecipeError, match="somebody's own code"):
        build_model(ModelReference(source="./net.py:build"), trusted=False)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested"])
def test_weights_are_read(tmp_path: Path, kind: str) -> None:
    state = model("./net.py:build").state_dict()
    state["one.bias"] = torch.arange(3.0)
    if kind == "safetensors":
        save_file(state, "w.safetensors")
    else:
        torch.save({"state_dict": state} if kind == "nested" else state, "w.pt")
    name = "w.safetensors" if kind == "safetensors" else "w.pt"
    assert torch.equal(model("./net.py:build", weights=name).one.bias, torch.arange(3.0))


def test_tied_weights_are_read_from_a_file_that_stores_them_once() -> None:
    net = model("./net.py:build", options={"tied": True})
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "two.weight"}
    save_file({name: tensor + 1 for name, tensor in state.items()}, "w.safetensors")
    read = model("./net.py:build", options={"tied": True}, weights="w.safetensors")
    assert read.two.weight is read.one.weight


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_is_refused_with_what_it_would_import(tmp_path: Path, writer: str) -> None:
    if writer == "torch":
        torch.save({"one.weight": Evil()}, "w.pt")
    else:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RecipeError, match="pickle that holds more than tensors") as error:
        model("./net.py:build", weights="w.pt")
    assert writer == "pickle" or "posix.system" in str(error.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("one.bias"), "missing in the file: one.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "not in the model: extra"),
        (lambda s: s.update({"one.bias": torch.ones(9)}), r"one.bias is \(9,\) in the file, \(3,\) in the model"),
        (lambda s: s.update({"one.bias": torch.full((3,), torch.nan)}), "NaN or infinite: one.bias"),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str) -> None:
    state = model("./net.py:build").state_dict()
    change(state)
    save_file(dict(state), "w.safetensors")
    with pytest.raises(RecipeError, match=message):
        model("./net.py:build", weights="w.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 not a zip"])
def test_damaged_weights(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(RecipeError, match="there is no weights file"):
        model("./net.py:build", weights=name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=r"is not a sound|is a pickle"):
        model("./net.py:build", weights=name)
