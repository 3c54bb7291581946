"""Pictures in one folder per class, read when they are needed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rarefy.errors import RecipeError


class Pictures(Dataset[Any]):
    """The pictures of `folder/CLASS/`, as (image `(channels, size, size)` from 0 to 1, number of the class)."""

    def __init__(self, folder: Path, classes: Sequence[str], size: int, grayscale: bool) -> None:
        try:
            import PIL.Image
        except ImportError as error:
            raise RecipeError("pictures need Pillow: pip install pillow") from error
        PIL.Image.init()
        endings = PIL.Image.registered_extensions()
        strangers = sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name not in classes)
        if strangers:
            raise RecipeError(f"{folder} has the class {strangers[0]!r}; the training set has {', '.join(classes)}")
        found = [
            (file, number)
            for number, name in enumerate(classes)
            for file in sorted((folder / name).glob("*"))
            if file.suffix.lower() in endings
        ]
        if not found:
            raise RecipeError(f"there are no pictures in {folder}/{{{','.join(classes)}}}")
        self.files = [file for file, _ in found]
        self.targets = [number for _, number in found]
        self.size, self.mode = size, "L" if grayscale else "RGB"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return _read(self.files[index], self.size, self.mode), self.targets[index]


def _read(file: Path, size: int, mode: str) -> torch.Tensor:
    """Return the largest square in the middle of a picture, scaled."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                pixels = np.asarray(ImageOps.fit(image.convert(mode), (size, size)), np.float32)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RecipeError(f"{file} is not a picture that can be read: {error}") from error
    return torch.from_numpy(pixels / 255).reshape(size, size, -1).permute(2, 0, 1)
