"""Trained weights from files, never by running what is in them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rarefy.errors import RecipeError


def load_weights(model: nn.Module, path: Path) -> None:
    """Read the weights of a `.safetensors` file, or of a torch file that holds tensors only, into `model`.

    Raises `RecipeError` when the file does not fit, is damaged, holds values that are not finite, or is a pickle that
    would run code.
    """
    if not path.is_file():
        raise RecipeError(f"there is no weights file {path}")
    state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    _refuse_broken(state, path)
    _refuse_misfit(model, state, path)
    model.load_state_dict(state, strict=False)


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{path} is not a sound safetensors file: {error}") from error


def _torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's version; what matters is raised
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{path} is a pickle that holds more than tensors and is not loaded, since that would run its code: "
            f"{_would_import(path)}. Save the weights alone, with safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path} is not a sound file of torch.save: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise RecipeError(f"{path} holds {type(loaded).__name__}, not a mapping of names to tensors")
    return loaded


def _would_import(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError):
        return "what it would import cannot be listed"
    return f"it would import {', '.join(names)}" if names else "it uses pickle features beyond tensors"


def _refuse_broken(state: dict[str, torch.Tensor], path: Path) -> None:
    broken = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise RecipeError(f"{path} has weights that are NaN or infinite: {', '.join(broken[:5])}")


def _refuse_misfit(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    tensors: dict[int, str] = {}
    for name in state:
        if name in own:
            tensors.setdefault(own[name].data_ptr(), name)
    # safetensors stores a tied tensor once
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in tensors]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing in the file", missing), ("not in the model", extra), ("other shapes", shapes))
        if names
    ]
    if problems:
        raise RecipeError(f"the weights of {path} do not fit the model; {'; '.join(problems)}")
