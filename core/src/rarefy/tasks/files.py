"""Readers of standard data files; sizes are checked against the file before memory is taken for them."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rarefy.errors import RecipeError


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


Pair = tuple[torch.Tensor, torch.Tensor]
_CIFAR_IMAGE = 3 * 32 * 32
# no stream of deflate unpacks to more, see zlib's technical details
_DEFLATE_RATIO = 1032


def read_idx(folder: Path, images: str, labels: str, classes: int) -> Pair:
    """Return images `(n, 1, height, width)` from 0 to 1 and labels of two IDX files, plain or .gz."""
    x, y = _idx(folder, images, 3), _idx(folder, labels, 1)
    if len(x) != len(y):
        raise RecipeError(f"{folder}: {images} has {len(x)} images and {labels} has {len(y)} labels")
    _check_labels(y, classes, folder / labels)
    return torch.from_numpy(x.astype(np.float32) / 255).unsqueeze(1), torch.from_numpy(y.astype(np.int64))


def read_cifar(files: Sequence[Path], label_bytes: int, classes: int) -> Pair:
    """Return images `(n, 3, 32, 32)` from 0 to 1 and labels of CIFAR's binary files; the last label byte counts."""
    record = label_bytes + _CIFAR_IMAGE
    rows = []
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise RecipeError(f"cannot read {file}: {error}. The binary version of the data set is needed") from error
        if len(data) == 0 or len(data) % record:
            raise RecipeError(f"{file} has {len(data)} bytes, not whole records of {record}; copy it again")
        rows.append(np.frombuffer(data, np.uint8).reshape(-1, record))
        _check_labels(rows[-1][:, label_bytes - 1], classes, file)
    table = np.concatenate(rows)
    x = table[:, label_bytes:].reshape(-1, 3, 32, 32).astype(np.float32) / 255
    return torch.from_numpy(x), torch.from_numpy(table[:, label_bytes - 1].astype(np.int64))


def read_npz(file: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an .npz file; arrays of objects, which are pickles, are refused."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            return {member.filename.removesuffix(".npy"): _npy(archive, member, file) for member in members}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise RecipeError(f"cannot read the arrays of {file}: {error}") from error


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> NDArray[np.generic]:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in headers:
            raise ValueError(f"{member.filename} has the unknown format version {version}")
        shape, _, dtype = headers[version](stream)
    promised = math.prod(shape) * dtype.itemsize
    most = min(member.compress_size, file.stat().st_size) * _DEFLATE_RATIO
    if promised > min(member.file_size, most):
        raise ValueError(f"{member.filename} promises {promised} bytes, more than it can hold")
    with archive.open(member) as stream:
        array: NDArray[np.generic] = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def _idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    # both spellings are in use
    names = [f"{stem}{ending}" for stem in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    file = next((folder / candidate for candidate in names if (folder / candidate).is_file()), None)
    if file is None:
        raise RecipeError(f"there is no {name} or {name}.gz in {folder}")
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return _idx_array(stream, dimensions, file)
    except (OSError, EOFError, zlib.error) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error


def _idx_array(stream: _Stream, dimensions: int, file: Path) -> NDArray[np.uint8]:
    head = stream.read(4 + 4 * dimensions)
    if len(head) < 4 + 4 * dimensions or head[:4] != bytes([0, 0, 8, dimensions]):
        raise RecipeError(f"{file} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
    promised = math.prod(shape)
    most = file.stat().st_size * (_DEFLATE_RATIO if file.suffix == ".gz" else 1)
    data = stream.read(promised + 1) if promised <= most else b""
    if len(data) != promised:
        has = "more" if len(data) > promised else "less"
        raise RecipeError(f"{file} promises {shape} and has {has} bytes than that; copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _check_labels(labels: NDArray[np.uint8], classes: int, file: Path) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise RecipeError(f"{file}: label {labels[wrong[0]]} of sample {wrong[0]} is not among the {classes} classes")
