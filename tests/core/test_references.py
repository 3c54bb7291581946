"""References lead to models and tasks, or to an error that says what would; weights never run code."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rarefy.errors import RecipeError
from rarefy.references import build_model, build_task
from rarefy.weightfiles import load_weights
from rarefy_schemas import ModelReference, TaskReference
from safetensors.torch import save_file
from torch import nn

CODE = """\
import random

import numpy as np
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

def draws():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, np.random.rand() + random.random())
    return model

MODEL = nn.Linear(1, 1)
"""

TIED = {"tied": True}


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
        ("./net.py:MODEL", "is a network; name a function that returns it"),
        ("./net.py:Linear", "Allowed: Net, build, draws, fails, number"),
        ("./net:build", "'./net' is no module; for a file write its ending too"),
        ("math:tau", "has no callable 'tau'"),
        ("builtins:dict", "returned dict, not a Module"),
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


def test_files_import_what_lies_beside_them(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "beside.py").write_text("WIDTH = 6")
    (tmp_path / "nets" / "wide.py").write_text(
        "from beside import WIDTH\nfrom torch import nn\ndef build(): return nn.Linear(2, WIDTH)"
    )
    path = list(sys.path)
    assert model("./nets/wide.py:build").out_features == 6
    assert sys.path == path


def test_a_module_that_lacks_another_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lacking.py").write_text("import no_such_package")
    with pytest.raises(RecipeError, match=r"importing lacking failed .* No module named 'no_such_package'"):
        model("lacking:build")


def test_every_generator_of_a_builder_is_seeded_and_put_back() -> None:
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    one, same, other = (build_model(ModelReference(source="./net.py:draws"), seed=seed) for seed in (1, 1, 2))
    assert np.random.rand() == expected
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


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


def test_tied_weights_that_differ_in_the_file_are_refused() -> None:
    state = {name: tensor.clone() for name, tensor in model("./net.py:build", options=TIED).state_dict().items()}
    save_file({**state, "two.weight": state["two.weight"] + 1}, "w.safetensors")
    with pytest.raises(RecipeError, match=r"one tensor in the model, several in the file: one\.weight and two\.weight"):
        model("./net.py:build", options=TIED, weights="w.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_names_of_wrapped_models_are_understood(prefix: str) -> None:
    state = model("./net.py:build").state_dict()
    torch.save({prefix + name: tensor + 1 for name, tensor in state.items()}, "w.pt")
    read = model("./net.py:build", weights="w.pt").state_dict()
    assert all(torch.equal(read[name], tensor + 1) for name, tensor in state.items())


def test_a_model_whose_own_names_have_that_prefix_is_left_alone() -> None:
    net = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save({name: tensor + 1 for name, tensor in net.state_dict().items()}, "w.pt")
    expected = net["module"].bias + 1
    load_weights(net, Path("w.pt"))
    assert torch.equal(net["module"].bias, expected)


def test_batch_norm_without_its_count_is_read() -> None:
    norm = nn.BatchNorm1d(2)
    state = {name: tensor + 3 for name, tensor in norm.state_dict().items() if name != "num_batches_tracked"}
    torch.save(state, "w.pt")
    load_weights(norm, Path("w.pt"))
    assert norm.weight.tolist() == [4, 4]


def test_an_empty_tensor_is_not_taken_for_a_tied_one() -> None:
    net = nn.ParameterDict({"a": torch.zeros(0), "b": torch.zeros(0)})
    save_file({"a": torch.zeros(0)}, "w.safetensors")
    with pytest.raises(RecipeError, match="missing in the file: b"):
        load_weights(net, Path("w.safetensors"))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("writer", ["torch", "old torch", "pickle", "old pickle"])
def test_a_pickle_is_refused_with_what_it_would_import(tmp_path: Path, writer: str) -> None:
    if "torch" in writer:
        torch.save({"one.weight": Evil()}, "w.pt", _use_new_zipfile_serialization=writer == "torch")
    else:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(Evil(), protocol=0 if "old" in writer else None))
    with pytest.raises(RecipeError, match="pickle that holds more than tensors") as error:
        model("./net.py:build", weights="w.pt")
    assert "it would import posix.system" in str(error.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("one.bias"), "missing in the file: one.bias"),
        (lambda s: s.update(extra=torch.ones(1)), "not in the model: extra"),
        (lambda s: s.update({"one.bias": torch.ones(9)}), r"one.bias is \(9,\) in the file, \(3,\) in the model"),
        (lambda s: s.update({"one.bias": torch.full((3,), torch.nan)}), "NaN or infinite: one.bias"),
        (lambda s: s.update({"one.bias": torch.ones(3, dtype=torch.int8)}), "one.bias is torch.int8 in the file"),
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
