"""Tasks hand out the same data for the same seed; data files are checked before they are believed."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rarefy.errors import RecipeError
from rarefy.task import Task
from rarefy.tasks import ClassificationTask
from rarefy.tasks.data import DATA
from torch import nn
from torch.utils.data import TensorDataset

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(100, 4)).astype(np.float32), np.arange(100) % 5


def order(loader: Any) -> list[float]:
    return [float(value) for batch in loader for value in batch[0][:, 0]]


def test_arrays_become_a_task_with_stratified_splits() -> None:
    task = ClassificationTask.from_arrays(X, Y, batch_size=8)
    assert isinstance(task, Task)
    parts = {
        split: torch.cat([task.labels(b) for b in task.loader(split)]) for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "validation": 10, "test": 20}
    assert all(len(part.bincount().unique()) == 1 for part in parts.values())
    everything = sorted(value for split in parts for value in order(task.loader(split)))
    assert everything == sorted(float(x) for x in X[:, 0])


def test_the_seed_decides_the_order() -> None:
    task = ClassificationTask.from_arrays(X, Y, batch_size=8)
    plain = order(task.loader("train"))
    shuffled = order(task.loader("train", shuffle=True, seed=1))
    assert order(task.loader("train", shuffle=True, seed=1)) == shuffled != plain
    assert order(task.loader("train", shuffle=True, seed=2)) != shuffled
    assert sorted(shuffled) == sorted(plain)
    assert [len(batch[0]) for batch in task.loader("train", 32)] == [32, 32, 6]
    assert [len(inputs) for (inputs,) in task.calibration(16, 2)] == [16, 16]
    assert torch.equal(task.example_inputs(3)[0], task.example_inputs(3)[0])
    assert len(task.example_inputs(500)[0]) == 500


def test_score_and_loss_by_hand() -> None:
    model = nn.Linear(4, 5).train()
    task = ClassificationTask.from_arrays(X, Y, test=(X, Y))
    expected = (model(torch.from_numpy(X)).argmax(1) == torch.from_numpy(Y)).float().mean()
    assert task.score(model, "test") == pytest.approx(float(expected))
    assert model.training
    batch = next(iter(task.loader("test", 100)))
    by_hand = -torch.log_softmax(model(batch[0]), 1)[range(100), batch[1]].mean()
    assert torch.allclose(task.loss(model(batch[0]), batch), by_hand)


def test_data_sets_and_tasks_without_labels() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, i: int) -> Any:
            return torch.from_numpy(X[i]), int(Y[i])

    pairs = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    task = ClassificationTask.from_datasets(pairs, pairs, Rows())
    assert next(iter(task.loader("validation")))[1].tolist() == Y[:10].tolist()
    bare = ClassificationTask.from_arrays(X, None)
    assert not bare.has_labels
    assert math.isnan(bare.score(nn.Linear(4, 5), "test"))
    with pytest.raises(RecipeError, match="no labels"):
        bare.loss(torch.zeros(2, 5), next(iter(bare.loader("train"))))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (X[:0], Y[:0], "is empty"),
        (X, Y[:9], "100 inputs and labels of shape"),
        (X, Y - 1, "class numbers from 0 on"),
        (X, Y / 2, "class numbers from 0 on"),
        (np.full((9, 4), np.nan, np.float32), Y[:9], "NaN or infinite"),
    ],
)
def test_wrong_arrays(inputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ClassificationTask.from_arrays(inputs, labels)
    with pytest.raises(RecipeError, match="some splits have labels"):
        ClassificationTask.from_arrays(X, Y, test=(X, None))


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, compress: bool = False, images: int = 50) -> None:
    folder.mkdir(exist_ok=True)
    for name, count in (("train", images), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", GENERATOR.integers(0, 256, (count, 6, 5))),
            ("labels-idx1", np.arange(50 if name == "train" else 20) % 5),
        ):
            file, data = folder / f"{name}-{kind}-ubyte", idx(array)
            if compress:
                file.with_suffix(".gz").write_bytes(gzip.compress(data))
            else:
                file.write_bytes(data)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(tmp_path: Path, compress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "fashion-mnist", compress)
    monkeypatch.setenv("RAREFY_DATA", str(tmp_path))
    task = DATA["fashion-mnist"]()
    x, y = task.splits["test"].tensors
    assert x.shape == (20, 1, 6, 5)
    assert (x >= 0).all()
    assert (x <= 1).all()
    assert y.tolist() == [i % 5 for i in range(20)]
    assert len(task.splits["train"]) == 45


def test_damaged_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAREFY_DATA", raising=False)
    with pytest.raises(RecipeError, match="Give the option `folder`, or set RAREFY_DATA"):
        DATA["mnist"]()
    with pytest.raises(RecipeError, match="there is no train-images"):
        DATA["mnist"](folder=str(tmp_path))
    write_mnist(tmp_path, images=40)
    with pytest.raises(RecipeError, match=r"has 40 images and .* has 50 labels"):
        DATA["mnist"](folder=str(tmp_path))
    write_mnist(tmp_path)
    file = tmp_path / "t10k-labels-idx1-ubyte"
    whole = file.read_bytes()
    for broken, message in (
        (whole[:-1], "truncated"),
        (b"", "not an IDX file"),
        (b"\0\0\x0d\1" + whole[4:], "not an IDX"),
        (whole[:4] + b"\xff" * 4 + whole[8:], "promises"),
    ):
        file.write_bytes(broken)
        with pytest.raises(RecipeError, match=message):
            DATA["mnist"](folder=str(tmp_path))
    file.unlink()
    Path(f"{file}.gz").write_bytes(gzip.compress(whole)[:-5])
    with pytest.raises(RecipeError, match="cannot read"):
        DATA["mnist"](folder=str(tmp_path))


@pytest.mark.parametrize(("name", "label_bytes", "classes"), [("cifar10", 1, 10), ("cifar100", 2, 100)])
def test_cifar_files(tmp_path: Path, name: str, label_bytes: int, classes: int) -> None:
    records = np.zeros((20, label_bytes + 3072), np.uint8)
    records[:, label_bytes - 1] = np.arange(20) % 10
    records[:, label_bytes] = 255
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "train.bin", "test.bin"]
    for file in files:
        (tmp_path / file).write_bytes(records.tobytes())
    x, y = DATA[name](folder=str(tmp_path)).splits["test"].tensors
    assert x.shape == (20, 3, 32, 32)
    assert x[:, 0, 0, 0].tolist() == [1.0] * 20
    assert y.tolist() == [i % 10 for i in range(20)]
    records[0, label_bytes - 1] = classes
    for file in files:
        (tmp_path / file).write_bytes(records.tobytes())
    with pytest.raises(RecipeError, match=f"label {classes} is not among the {classes} classes"):
        DATA[name](folder=str(tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(RecipeError, match="not whole records"):
        DATA[name](folder=str(tmp_path))


def test_npz_files(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, x_train=X, y_train=Y, x_test=X[:10], y_test=Y[:10])
    assert len(DATA["npz"](file=str(file)).splits["test"]) == 10
    np.savez(file, x_train=X)
    with pytest.raises(RecipeError, match="lacks the arrays y_train, x_test, y_test"):
        DATA["npz"](file=str(file))
    np.savez(file, x_train=np.array([{"a": 1}], object))
    with pytest.raises(RecipeError, match="cannot read the arrays"):
        DATA["npz"](file=str(file))
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(RecipeError, match="cannot read the arrays"):
        DATA["npz"](file=str(file))


def test_image_folders(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (9, 7), (100 * number, 0, 0)).save(folder / f"{i}.png")
    x, y = DATA["images"](folder=str(tmp_path), size=4).splits["test"].tensors
    assert x.shape == (20, 3, 4, 4)
    assert y.tolist() == [0] * 10 + [1] * 10
    assert x[-1, 0, 0, 0] == pytest.approx(100 / 255)
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"0\.png is not a picture"):
        DATA["images"](folder=str(tmp_path))
    with pytest.raises(RecipeError, match="no class folders"):
        DATA["images"](folder=str(tmp_path / "none"))


def test_the_data_that_ship_inside_packages() -> None:
    digits, mnist = DATA["digits"](), DATA["mnist-5k"]()
    assert [len(mnist.splits[s]) for s in ("train", "validation", "test")] == [3600, 400, 1000]
    assert sum(len(digits.splits[s]) for s in ("train", "validation", "test")) == 1797
    assert mnist.example_inputs(2)[0].shape == (2, 1, 28, 28)
    assert float(mnist.example_inputs(64)[0].max()) == 1
