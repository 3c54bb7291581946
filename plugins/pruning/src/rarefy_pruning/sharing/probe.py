"""Whether neurons can be merged at all, found by trying it on neurons that are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from rarefy_pruning.sharing.merging import Merge
from rarefy_pruning.sharing.neurons import Neurons, merge_columns_


@torch.no_grad()
def why_not_alike(model: nn.Module, neurons: Neurons, inputs: tuple[Any, ...], seed: int) -> str | None:
    """Return why merging would be wrong even for neurons of the same weights, or None.

    Between a layer and those that read it there may be any operations, as long as they treat all neurons by one
    function and each by itself. To know, all neurons get the same weights (those of a normalization differ, in such a
    way that together they do the same). Then all that is read of them must be the same, and merging all into one
    must leave the outputs as they are. The weights are tried with both signs, so that rectifiers let one through.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = model.get_parameter(f"{neurons.layer}.weight").shape[1:]
    row = torch.randn(shape, generator=generator, dtype=torch.float64) / max(1, shape.numel()) ** 0.5
    seen_any = False
    for sign in (1, -1):
        tensors = _equal_units(model, neurons, sign * row, generator)
        with _watch(model, neurons) as seen:
            before = _run(model, tensors, inputs)
        if len(seen) < len(neurons.readers):
            return "a layer that reads them is not called as a module, so what it reads cannot be checked"
        if not all(_close(values, values[..., :1].expand_as(values)) for values in seen.values()):
            return "they go through different functions, or a normalization that does not follow directly"
        after = _run(model, tensors | _merged(model, neurons, tensors), inputs)
        if not all(map(_close, _floats(after), _floats(before))):
            return "what one of them does depends on the others"
        seen_any = seen_any or all(bool(values.any()) for values in seen.values())
    return None if seen_any else "nothing gets through to the layers that read them"


def _equal_units(
    model: nn.Module, neurons: Neurons, row: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return tensors with which every unit is the function `row * x + 0.1`, by differing means if normalized."""
    layer = model.get_submodule(neurons.layer)
    units, shift = len(neurons.rows), 0.1

    def normal() -> torch.Tensor:
        return torch.randn(units, generator=generator, dtype=row.dtype)

    def positive() -> torch.Tensor:
        return 0.5 + torch.rand(units, generator=generator, dtype=row.dtype)

    changes: dict[str, torch.Tensor] = {}
    scale, bias = torch.ones(units, dtype=row.dtype), torch.full((units,), shift, dtype=row.dtype)
    if neurons.norm is not None:
        norm = model.get_submodule(neurons.norm)
        bias = normal() if layer.bias is not None else torch.zeros_like(bias)
        drawn = {"running_var": positive()}
        scale = (drawn["running_var"] + norm.eps).rsqrt()
        if norm.weight is not None:
            drawn |= {"weight": positive() * normal().sign(), "bias": normal()}
            scale = scale * drawn["weight"]
        # (bias - mean) * scale + the normalization's bias = shift
        drawn["running_mean"] = bias - (shift - drawn.get("bias", 0.0)) / scale
        for leaf, values in drawn.items():
            changes[f"{neurons.norm}.{leaf}"] = _put(getattr(norm, leaf), neurons.norm_rows, values)
    rows = row.unsqueeze(0) / scale.reshape(-1, *[1] * row.dim())
    changes[f"{neurons.layer}.weight"] = _put(layer.weight, neurons.rows, rows)
    if layer.bias is not None:
        changes[f"{neurons.layer}.bias"] = _put(layer.bias, neurons.rows, bias)
    return changes


def _merged(model: nn.Module, neurons: Neurons, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with which the first unit stands for all and the others give and are given nothing."""
    merges = [Merge(0, unit, 0.0) for unit in range(1, len(neurons.rows))]
    changes = {}
    for name in tensors:
        rows = neurons.rows if name.startswith(f"{neurons.layer}.") else neurons.norm_rows
        if not name.endswith("running_var"):
            assert rows is not None
            changes[name] = _put(tensors[name], rows[1:], tensors[name].new_zeros(1))
    for member in neurons.readers:
        changes[member.tensor] = model.get_parameter(member.tensor).detach().clone()
        merge_columns_(changes[member.tensor], member.indices, merges)
    return changes


@contextmanager
def _watch(model: nn.Module, neurons: Neurons) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what the readers are given of the units, `(..., k, units)`, by the name of their weight."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for member in neurons.readers:
        module = model.get_submodule(member.tensor.rpartition(".")[0])
        # unbatched inputs have a dimension less at the front
        dim = 1 - module.weight.dim()

        def hook(_: nn.Module, args: Any, kwargs: Any, member: Any = member, dim: int = dim) -> None:
            values = (*args, *kwargs.values())[0].movedim(dim, -1)
            seen[member.tensor] = values[..., member.indices].transpose(-1, -2)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, tensors: dict[str, torch.Tensor], inputs: tuple[Any, ...]) -> Any:
    """Run the model with other tensors, random operations the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return functional_call(model, tensors, inputs)


def _put(tensor: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    changed = tensor.detach().clone()
    changed[rows] = values.to(changed)
    return changed


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors agree to half the digits of their type."""
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    tolerance = torch.finfo(one.dtype).eps ** 0.5 * float(other.abs().max())
    return bool((one - other).abs().max() <= tolerance)
