"""From a spec to the model it describes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rarefy_schemas import ModelSpec
from torch import nn

import rarefy.modules.torch_nn  # noqa: F401 - registers the classes of torch.nn
from rarefy.errors import ArtifactError
from rarefy.modules.kinds import construct
from rarefy.modules.plain import from_json
from rarefy.modules.skeleton import Base, as_base, skeleton


def build(spec: ModelSpec, base: Base | nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Build the network of a spec on the meta device, without values; only registered classes are constructed.

    Raises `ArtifactError` when a class is not registered, when the spec is a difference and no base is given, and
    when it does not fit the base.
    """
    if spec.root is not None:
        model = construct(spec.root)
    elif base is None:
        raise ArtifactError("the file holds only what differs from its base; give the code that builds it as `base`")
    else:
        model = skeleton(as_base(base))
    for name, module in spec.modules.items():
        parent, _, leaf = name.rpartition(".")
        owner = find(model, parent)
        if not re.fullmatch(r"\w+", leaf) or (leaf not in owner._modules and hasattr(owner, leaf)):
            raise ArtifactError(f"the file puts a module at {name!r}, which is no place for one; is the base right?")
        owner._modules[leaf] = construct(module)
    for name, attributes in spec.attributes.items():
        for attribute, value in attributes.items():
            _set(find(model, name), attribute, from_json(value))
    tie(model, spec.ties)
    return model


def find(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`; raise `ArtifactError` when there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ArtifactError(f"the base has no module {name!r}; is it the one the file was written with?") from error


def tie(model: nn.Module, ties: dict[str, str]) -> None:
    """Make tensors the same as the ones they are tied to."""
    for name, first in ties.items():
        source, _, source_leaf = first.rpartition(".")
        target, _, leaf = name.rpartition(".")
        set_tensor(find(model, target), leaf, tensor_of(find(model, source), source_leaf), name)


def tensor_of(owner: nn.Module, leaf: str) -> Any:
    """Return the parameter or buffer called `leaf` of a module, None when it has none."""
    return owner._parameters.get(leaf, owner._buffers.get(leaf))


def set_tensor(owner: nn.Module, leaf: str, value: Any, name: str) -> None:
    """Put a tensor in the place of a parameter or buffer; raise `ArtifactError` when there is no such place."""
    if value is None or tensor_of(owner, leaf) is None:
        raise ArtifactError(f"the base has no tensor {name!r}; is it the one the file was written with?")
    if isinstance(tensor_of(owner, leaf), nn.Parameter) != isinstance(value, nn.Parameter):
        raise ArtifactError(f"tensor {name!r} is a parameter on one side and a buffer on the other")
    # setattr, since recurrent modules keep a second list of their weights
    setattr(owner, leaf, value)


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set a plain-data attribute, but never one that is code."""
    known = getattr(module, name, None)
    is_slot = name in module._modules or name in module._parameters or name in module._buffers
    if not name.isidentifier() or name.startswith("_") or name == "training" or hasattr(nn.Module, name):
        raise ArtifactError(f"the file sets the attribute {name!r} of {type(module).__name__}, which is not allowed")
    if (is_slot and value is not None) or (not is_slot and callable(getattr(type(module), name, None))):
        raise ArtifactError(f"the file replaces {name!r} of {type(module).__name__} by plain data; it is not sound")
    setattr(module, name, list(value) if isinstance(known, list) and isinstance(value, tuple) else value)
