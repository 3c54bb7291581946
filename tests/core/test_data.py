"""Data files are checked before they are believed."""

from __future__ import annotations

import gzip
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rarefy.errors import RecipeError
from rarefy.tasks.data import DATA

GENERATOR = np.random.default_rng(0)
X, Y = GENERATOR.normal(size=(100, 4)).astype(np.float32), np.arange(100) % 5


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
        (whole[:-1], "less bytes"),
        (whole + b"1", "more bytes"),
        (whole[:-1] + b"\x0b", "label 11 of sample 19 is not among the 10 classes"),
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


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    head = idx(np.zeros((0, 28, 28)))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(head[:4] + (10).to_bytes(4, "big") + head[8:] + bytes(64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError, match="has more bytes"):
            DATA["mnist"](folder=str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_the_other_spelling_of_idx_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    assert len(DATA["mnist"](folder=str(tmp_path)).splits["test"]) == 20


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
    with pytest.raises(RecipeError, match=f"label {classes} of sample 0 is not among the {classes} classes"):
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


@pytest.mark.parametrize("shape", [(50, 6, 5), (50, 1, 6, 5), (50, 6, 5, 1)])
def test_images_in_an_npz_file(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 51, np.uint8)
    labels = np.arange(50)[:, None] % 5
    np.savez(tmp_path / "i.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    (inputs,) = DATA["npz"](file=str(tmp_path / "i.npz")).example_inputs(2)
    assert torch.equal(inputs, torch.full((2, 1, 6, 5), 0.2))


@pytest.mark.parametrize("claimed", [10**15, 70_000])
def test_an_npz_file_that_promises_more_than_it_holds(tmp_path: Path, claimed: int) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (claimed,)})
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("x_train.npy", header.getvalue() + bytes(10))
    with pytest.raises(RecipeError, match=f"x_train.npy promises {claimed} bytes, more than it can hold"):
        DATA["npz"](file=str(tmp_path / "p.npz"))


def test_image_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (9, 7), (100 * number, 0, 0)).save(folder / f"{i}.png")
    task = DATA["images"](folder=str(tmp_path), size=4)
    x, y = next(iter(task.loader("test")))
    assert x.shape == (20, 3, 4, 4)
    assert y.tolist() == [0] * 10 + [1] * 10
    assert x[-1, 0, 0, 0] == pytest.approx(100 / 255)
    assert [len(task.splits[split]) for split in ("train", "validation")] == [18, 2]
    assert DATA["images"](folder=str(tmp_path), size=4, grayscale=True).example_inputs()[0].shape == (1, 1, 4, 4)
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"0\.png is not a picture"):
        list(DATA["images"](folder=str(tmp_path)).loader("test"))


def test_wrong_image_folders(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no class folders"):
        DATA["images"](folder=str(tmp_path))
    for place in ("train/cat", "test/dog"):
        (tmp_path / place).mkdir(parents=True)
    with pytest.raises(RecipeError, match="there are no pictures"):
        DATA["images"](folder=str(tmp_path))
    Image.new("L", (5, 5)).save(tmp_path / "train" / "cat" / "1.PNG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not a picture")
    with pytest.raises(RecipeError, match="has the class 'dog'; the training set has cat"):
        DATA["images"](folder=str(tmp_path))


def test_a_picture_that_claims_to_be_huge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        (tmp_path / "train" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40)).save(tmp_path / "train" / "cat" / f"{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RecipeError, match=r"is not a picture that can be read: Image size \(1600 pixels\)"):
        DATA["images"](folder=str(tmp_path)).example_inputs()


def test_the_data_that_ship_inside_packages() -> None:
    digits, mnist = DATA["digits"](), DATA["mnist-5k"]()
    assert [len(mnist.splits[s]) for s in ("train", "validation", "test")] == [3600, 400, 1000]
    assert sum(len(digits.splits[s]) for s in ("train", "validation", "test")) == 1797
    assert mnist.example_inputs(2)[0].shape == (2, 1, 28, 28)
    assert float(mnist.example_inputs(64)[0].max()) == 1
