"""Readers of standard data files; sizes are checked against the file before anything is taken on trust."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rarefy.errors import RecipeError

Pair = tuple[torch.Tensor, torch.Tensor]
_CIFAR_IMAGE = 3 * 32 * 32
_LARGEST_FILE = 4 << 30


def read_idx(folder: Path, images: str, labels: str) -> Pair:
    """Return images `(n, 1, height, width)` from 0 to 1 and labels of two IDX files, plain or .gz."""
    x, y = _idx(folder, images, 3), _idx(folder, labels, 1)
    if len(x) != len(y):
        raise RecipeError(f"{folder}: {images} has {len(x)} images and {labels} has {len(y)} labels")
    return torch.from_numpy(x.astype(np.float32) / 255).unsqueeze(1), torch.from_numpy(y.astype(np.int64))


def read_cifar(files: Sequence[Path], label_bytes: int, classes: int) -> Pair:
    """Return images `(n, 3, 32, 32)` from 0 to 1 and labels of CIFAR's binary files; the last label byte counts."""
    record = label_bytes + _CIFAR_IMAGE
    rows = []
    for file in files:
        data = _bytes(file)
        if len(data) == 0 or len(data) % record:
            raise RecipeError(f"{file} has {len(data)} bytes, not whole records of {record}; copy it again")
        rows.append(np.frombuffer(data, np.uint8).reshape(-1, record))
    table = np.concatenate(rows)
    labels = table[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= classes:
        raise RecipeError(f"{files[0].parent}: label {labels.max()} is not among the {classes} classes")
    x = table[:, label_bytes:].reshape(-1, 3, 32, 32).astype(np.float32) / 255
    return torch.from_numpy(x), torch.from_numpy(labels)


def read_npz(file: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an .npz file; arrays of objects, which are pickles, are refused."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise RecipeError(f"cannot read the arrays of {file}: {error}") from error


def read_images(folder: Path, classes: Sequence[str], size: int) -> Pair:
    """Return the pictures of `folder/CLASS/` as `(n, 3, size, size)` from 0 to 1, and the classes' numbers."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RecipeError("pictures need Pillow: pip install pillow") from error
    x, y = [], []
    for number, name in enumerate(classes):
        for file in sorted(path for path in (folder / name).glob("*") if path.is_file()):
            try:
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB").resize((size, size)), np.float32)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise RecipeError(f"{file} is not a picture that can be read: {error}") from error
            x.append(torch.from_numpy(pixels / 255).permute(2, 0, 1))
            y.append(number)
    if not x:
        raise RecipeError(f"there are no pictures in {folder}/{{{','.join(classes)}}}")
    return torch.stack(x), torch.tensor(y)


def _idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    file = next((folder / n for n in (name, f"{name}.gz") if (folder / n).is_file()), None)
    if file is None:
        raise RecipeError(f"there is no {name} or {name}.gz in {folder}")
    data = _bytes(file)
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise RecipeError(f"{file} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if math.prod(shape) != len(data) - start:
        raise RecipeError(f"{file} promises {shape} and has {len(data) - start} bytes; it is truncated, copy it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _bytes(file: Path) -> bytes:
    try:
        if file.suffix != ".gz":
            return file.read_bytes()
        with gzip.open(file) as stream:
            data = stream.read(_LARGEST_FILE)
            if stream.read(1):
                raise RecipeError(f"{file} unpacks to more than {_LARGEST_FILE} bytes")
            return data
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error
