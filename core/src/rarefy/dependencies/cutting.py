"""Remove units: new tensors, corrected attributes, and nothing changed when it fails."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rarefy.dependencies.groups import Claims, Dependencies, Group, Removal, tensors
from rarefy.errors import StageError
from rarefy.modules.attention import MultiheadAttention, opened
from rarefy.technique import replace_

# attributes of torch's own layers that follow from the shapes of their tensors
_SHAPES: dict[type[nn.Module], tuple[tuple[str, str, int], ...]] = {
    nn.Linear: (("out_features", "weight", 0), ("in_features", "weight", 1)),
    nn.Embedding: (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1)),
    nn.EmbeddingBag: (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1)),
    nn.modules.batchnorm._NormBase: (("num_features", "weight", 0),),
    nn.LayerNorm: (("normalized_shape", "weight", 0),),
    nn.RMSNorm: (("normalized_shape", "weight", 0),),
    nn.GroupNorm: (("num_channels", "weight", 0),),
    nn.PReLU: (("num_parameters", "weight", 0),),
    nn.RNNBase: (("input_size", "weight_ih_l0", 1), ("hidden_size", "weight_hh_l0", 1)),
    nn.RNNCellBase: (("input_size", "weight_ih", 1), ("hidden_size", "weight_hh", 1)),
    MultiheadAttention: (
        ("embed_dim", "in_proj_weight", 1),
        ("embed_dim", "q_proj_weight", 1),
        ("kdim", "k_proj_weight", 1),
        ("vdim", "v_proj_weight", 1),
    ),
}


def cut(model: nn.Module, dependencies: Dependencies, removal: Removal) -> nn.Module:
    """Return a copy of `model` without the units in `removal`; `model` is not changed.

    Gradients and optimizer states do not carry over. Raises `StageError` when a group is pinned or unknown, a unit
    number is out of range, a tensor would be left empty, or the groups were found in a model of other shapes.
    """
    removal = checked(dependencies, removal)
    kept = _kept(model, dependencies, removal)
    memo: dict[int, Any] = {}
    for name, tensor in tensors(model).items():
        smaller = tensor.detach()
        for dim in range(tensor.dim()):
            if (name, dim) in kept:
                smaller = smaller.index_select(dim, kept[name, dim].to(tensor.device))
        if smaller is not tensor and smaller.shape != tensor.shape:
            wrapped = nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller
            memo[id(tensor)] = wrapped
    changed = {name for name, _ in kept}
    result = copy.deepcopy(model, memo)
    _open_attention_(result, changed)
    _correct_(result, dependencies, removal)
    forget_(result)
    return result


def mask(model: nn.Module, dependencies: Dependencies, removal: Removal, factor: float = 0.0) -> nn.Module:
    """Return a copy of `model` with the slices of the units in `removal` times `factor`; shapes stay."""
    result = copy.deepcopy(model)
    mask_(result, dependencies, removal, factor)
    return result


def mask_(model: nn.Module, dependencies: Dependencies, removal: Removal, factor: float = 0.0) -> None:
    """Multiply the slices of the units in `removal` by `factor`."""
    found = tensors(model)
    for name, units in checked(dependencies, removal).items():
        for member in dependencies[name].members:
            tensor = found[member.tensor]
            if tensor.is_floating_point() or tensor.is_complex():
                with torch.no_grad():
                    where = member.indices[units].flatten().to(tensor.device)
                    if factor:
                        tensor.index_copy_(member.dim, where, tensor.index_select(member.dim, where) * factor)
                    else:
                        tensor.index_fill_(member.dim, where, 0)
    forget_(model)


def forget_(model: nn.Module) -> None:
    """Tell the modules that their tensors changed, so that they drop what they computed from these earlier.

    A move to another device or precision goes the same way, and modules that keep such things heed it.
    """
    model._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]


def checked(dependencies: Dependencies, removal: Removal) -> dict[str, torch.Tensor]:
    """Return the removal without empty entries, each unit once; raise `StageError` when it cannot be done."""
    result = {}
    for name, units in removal.items():
        group = dependencies[name]
        units = torch.as_tensor(units, device="cpu")
        if not units.numel():
            continue
        if units.dtype == torch.bool or units.is_floating_point() or units.is_complex():
            raise StageError(f"units of {name!r} are given by their numbers, int64, not as {units.dtype}")
        units = torch.unique(units.long())
        if group.pinned is not None:
            raise StageError(f"the group {name!r} cannot be cut: {group.pinned}")
        if units[0] < 0 or units[-1] >= group.units:
            raise StageError(
                f"group {name!r} has the units 0 to {group.units - 1}, not {int(units[0])}..{int(units[-1])}"
            )
        result[name] = units
    _refuse_crossing([dependencies[name] for name in result])
    return result


def _refuse_crossing(groups: Sequence[Group]) -> None:
    claims = Claims()
    for group in groups:
        if (crossed := claims.take(group)) is not None:
            other, tensor = crossed
            raise StageError(
                f"the groups {other!r} and {group.name!r} cut {tensor!r} in two ways at once; "
                "cut one of them, then find the dependencies again"
            )


def removed(dependencies: Dependencies, removal: Removal) -> dict[tuple[str, int], torch.Tensor]:
    """Return the positions to remove of each (tensor, dimension), each once, in order."""
    gone: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    for name, units in removal.items():
        for member in dependencies[name].members:
            gone[member.tensor, member.dim].append(member.indices[units].flatten())
    return {key: torch.unique(torch.cat(indices)) for key, indices in gone.items()}


def _kept(model: nn.Module, dependencies: Dependencies, removal: Removal) -> dict[tuple[str, int], torch.Tensor]:
    found, kept = tensors(model), {}
    for (name, dim), gone in removed(dependencies, removal).items():
        given = found[name].shape if name in found else None
        if given != dependencies.shapes.get(name, given) or given is None or int(gone[-1]) >= given[dim]:
            raise StageError(f"the groups belong to another model: {name!r} does not fit; find its dependencies again")
        stays = torch.ones(given[dim], dtype=torch.bool)
        stays[gone] = False
        if not stays.any():
            raise StageError(f"nothing would be left of {name!r} along dimension {dim}; keep at least one unit")
        kept[name, dim] = stays.nonzero().flatten()
    return kept


def _open_attention_(model: nn.Module, changed: set[str]) -> None:
    """Replace torch's attention, which insists on its head count, where it was cut."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.MultiheadAttention and any(tensor.startswith(f"{name}.") for tensor in changed):
            replace_(model, module, opened(module))


def _correct_(model: nn.Module, dependencies: Dependencies, removal: Removal) -> None:
    """Bring the attributes of modules in line with the new shapes."""
    modules = dict(model.named_modules())
    for length in dependencies.lengths:
        after = length.after(removal)
        if after == length.before:
            continue
        module = modules[length.module]
        if length.item is None:
            setattr(module, length.attribute, after)
        else:
            value = getattr(module, length.attribute)
            setattr(module, length.attribute, type(value)((*value[: length.item], after, *value[length.item + 1 :])))
    for module in modules.values():
        for attribute, (name, dim) in follows(module).items():
            shape = getattr(module, name).shape
            setattr(module, attribute, tuple(shape) if attribute == "normalized_shape" else shape[dim])
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
            module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)


def follows(module: nn.Module) -> dict[str, tuple[str, int]]:
    """Return which attributes of one of torch's layers follow from which dimension of which of its tensors."""
    for kind, sources in _SHAPES.items():
        if isinstance(module, kind):
            return {
                attribute: (name, dim)
                for attribute, name, dim in sources
                if getattr(module, name, None) is not None and getattr(module, name).dim() > dim
            }
    return {}
