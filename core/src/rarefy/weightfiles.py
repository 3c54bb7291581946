"""Trained weights from files, never by running what is in them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rarefy.errors import RecipeError
from rarefy.pickles import imports

_PREFIXES = ("module.", "_orig_mod.")  # of wrappers for several devices and of torch.compile


def load_weights(model: nn.Module, path: Path) -> None:
    """Read the weights of a `.safetensors` file, or of a torch file that holds tensors only, into `model`.

    Raises `RecipeError` when the file does not fit, is damaged, holds values that are not finite, or is a pickle that
    would run code.
    """
    if not path.is_file():
        raise RecipeError(f"there is no weights file {path}")
    state = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    state = _unwrapped(state, list(model.state_dict()))
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
    except Exception:  # not the format of today's torch.save
        names = imports(path)
    return f"it would import {', '.join(names)}" if names else "it uses pickle features beyond tensors"


def _unwrapped(state: dict[str, torch.Tensor], own: list[str]) -> dict[str, torch.Tensor]:
    """Take off the prefixes that wrappers put before every name, unless the model's own names have them."""
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state) and not any(n.startswith(prefix) for n in own):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in state.items()}, own)
    return state


def _refuse_broken(state: dict[str, torch.Tensor], path: Path) -> None:
    numbers = {name: t for name, t in state.items() if t.is_floating_point() or t.is_complex()}
    broken = [name for name, tensor in numbers.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RecipeError(f"{path} has weights that are NaN or infinite: {', '.join(broken[:5])}")


def _refuse_misfit(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    both = [name for name in state if name in own]
    problems = {
        "missing in the file": _missing(own, state),
        "not in the model": [name for name in state if name not in own],
        "other shapes": [
            f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            for name in both
            if state[name].shape != own[name].shape
        ],
        "other kinds of numbers": [
            f"{name} is {state[name].dtype} in the file, {own[name].dtype} in the model"
            for name in both
            if state[name].is_floating_point() != own[name].is_floating_point()
        ],
        "one tensor in the model, several in the file": _torn(own, state, both),
    }
    told = [f"{what}: {', '.join(n[:5])}{', ...' if len(n) > 5 else ''}" for what, n in problems.items() if n]
    if told:
        raise RecipeError(f"the weights of {path} do not fit the model; {'; '.join(told)}")


def _place(name: str, tensor: torch.Tensor) -> Hashable:
    """Return what two names of one tensor have in common."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name


def _missing(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    # safetensors stores a tied tensor once, and torch before 0.4.1 did not count the batches of a normalization
    given = {_place(name, tensor) for name, tensor in own.items() if name in state}
    absent = [name for name, tensor in own.items() if name not in state and _place(name, tensor) not in given]
    return [name for name in absent if name.rpartition(".")[2] != "num_batches_tracked"]


def _torn(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], both: list[str]) -> list[str]:
    first: dict[Hashable, str] = {}
    pairs = [(first.setdefault(_place(name, own[name]), name), name) for name in both]
    return [f"{one} and {other}" for one, other in pairs if not torch.equal(state[one], state[other])]
