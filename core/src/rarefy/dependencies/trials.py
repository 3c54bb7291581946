"""The models that groups are tried on, their runs, and the comparison of what they give."""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from rarefy.dependencies.finding import Inputs, fresh, leaves
from rarefy.dependencies.groups import Dependencies, Group, Removal, tensors

FAINT = 1e-6
"""What slices are multiplied by where zero has no meaning."""
_FAINT_SCALE = 1e-2
_TORCH = str(Path(torch.__file__).parent)


def lively(model: nn.Module) -> nn.Module:
    """Return the model with random values for constant parameters, such as scales that start at zero or near it.

    What they multiply would not show in the outputs. All other tensors are the model's own.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for tensor in tensors(model).values():
        memo[id(tensor)] = tensor
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.numel() and _says_nothing(tensor):
            values = torch.rand(tensor.shape, generator=generator) + 0.5
            # products of many stay of the size of one
            values /= tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 1
            memo[id(tensor)] = nn.Parameter(values.to(tensor), tensor.requires_grad)
    return copy.deepcopy(model, memo)


def _says_nothing(tensor: torch.Tensor) -> bool:
    with torch.no_grad():
        first = tensor.flatten()[0]
        return bool(tensor.abs().max() < _FAINT_SCALE) or (tensor.numel() > 1 and bool((tensor == first).all()))


def exact(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, float]:
    """Return a model and inputs in double precision, if it runs so, and the relative difference that is no rounding."""
    if {t.dtype for t in model.parameters() if t.is_floating_point()} == {torch.float32}:
        double = copy.deepcopy(model).double()
        wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x, inputs)
        with contextlib.suppress(Exception):  # code that asks for float32 by name
            run(double, wide)
            return double, wide, 1e-6
    return model, inputs, 1e-4


def with_twins(model: nn.Module, found: Dependencies, names: Sequence[str]) -> nn.Module:
    """Return a copy in which every second unit of the groups is made like the one before it, and read by nobody.

    A mean or a biased variance over all units is then that over the first of each pair.
    """
    result = copy.deepcopy(model)
    state = tensors(result)
    for name in names:
        for member in found[name].members:
            tensor = state[member.tensor]
            first, second = (member.indices[i::2].flatten() for i in (0, 1))
            with torch.no_grad():
                values = tensor.index_select(member.dim, first)
                tensor.index_copy_(member.dim, second, torch.zeros_like(values) if member.reads else values)
    return result


def one_of_each(groups: Iterable[Group]) -> Removal:
    """Return one unit in the middle of each group."""
    return {group.name: torch.tensor([group.units // 2]) for group in groups}


def every_other(groups: Iterable[Group]) -> Removal:
    """Return units such that whatever picks units by their numbers picks others afterwards."""
    return {group.name: torch.arange(0, group.units if group.units > 3 else 1, 2) for group in groups}


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Return the outputs of a model in evaluation, on inputs of its own and a fixed seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)  # not those of other devices, whose state is not kept
        return model.eval()(*fresh(inputs))


def follow(model: nn.Module) -> list[str]:
    """Return a list that holds the names of the running modules, also when one fails."""
    stack: list[str] = []

    def enter(name: str) -> Any:
        return lambda module, args: stack.append(name)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)
    return stack


def same_outputs(one: Any, other: Any, tolerance: float = 1e-3) -> bool:
    """Tell whether two outputs are equal to a tolerance relative to their largest value, wider in half precision."""
    pairs = list(itertools.zip_longest(leaves(one), leaves(other)))
    return all(
        type(a) is type(b) and (not isinstance(a, torch.Tensor) or _same_tensor(a, b, tolerance)) for a, b in pairs
    )


def _same_tensor(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = other[other.isfinite()].abs().max() if other.isfinite().any() else other.new_zeros(())
    slack = max(tolerance, 16 * torch.finfo(one.dtype).eps)
    return torch.allclose(one, other, rtol=slack, atol=float(scale) * slack, equal_nan=True)


def finite(outputs: Any) -> bool:
    """Tell whether all outputs are finite."""
    return all(bool(x.isfinite().all()) for x in leaves(outputs) if isinstance(x, torch.Tensor))


def explained(error: Exception) -> str:
    """Return the message with the place in the model's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_TORCH) and Path(f.filename).parent != Path(__file__).parent]
    place = f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the model does not run without one of its units{place}: {first}"
