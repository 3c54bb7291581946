"""The models that groups are tried on, their runs, and the comparison of what they give."""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from rarefy.dependencies.cutting import mask_
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
    # most tensors show in a few entries that they say something
    return all(_constant_or_faint(part) for part in (tensor.detach().flatten()[:64], tensor.detach()))


def _constant_or_faint(tensor: torch.Tensor) -> bool:
    first = tensor.flatten()[0]
    return bool(tensor.abs().max() < _FAINT_SCALE) or (tensor.numel() > 1 and bool((tensor == first).all()))


Trial = tuple[nn.Module, Inputs, float]
"""A model, its inputs, and the difference of outputs, relative to the largest, that is no rounding."""


def rough(model: nn.Module, inputs: Inputs) -> Trial:
    """Return a trial in the model's own precision."""
    return model, inputs, 2e-6


def exact(model: nn.Module, inputs: Inputs) -> Trial:
    """Return a trial in double precision, if the model runs so."""
    if {t.dtype for t in model.parameters() if t.is_floating_point()} == {torch.float32}:
        double = copy.deepcopy(model).double()
        wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x, inputs)
        with contextlib.suppress(Exception):  # code that asks for float32 by name
            run(double, wide)
            return double, wide, 1e-6
    return model, inputs, 1e-4


def without(model: nn.Module, found: Dependencies, removal: Removal, factor: float = 0.0) -> nn.Module:
    """Return a copy that computes what `model` does without the units in `removal`, in its shapes.

    Their slices are multiplied by `factor`. In groups over which a mean or variance is taken, of which `removal` names
    every second unit from the first on, they become copies of the unit after each that nobody reads: a mean or biased
    variance over all units is then that over the ones that stay.
    """
    result = copy.deepcopy(model)
    twins = [name for name in removal if found[name].changes_statistics]
    _make_twins_(result, found, twins)
    mask_(result, found, {name: units for name, units in removal.items() if name not in twins}, factor)
    return result


def _make_twins_(model: nn.Module, found: Dependencies, names: Sequence[str]) -> None:
    state = tensors(model)
    for name in names:
        for member in found[name].members:
            tensor = state[member.tensor]
            gone, stays = (member.indices[i::2].flatten() for i in (0, 1))
            with torch.no_grad():
                values = tensor.index_select(member.dim, stays)
                tensor.index_copy_(member.dim, gone, torch.zeros_like(values) if member.reads else values)


def has_twins(group: Group) -> bool:
    """Tell whether the units of a group can be made equal in pairs of which one is not read."""
    return group.units % 2 == 0 and any(member.reads for member in group.members)


def one_of_each(groups: Iterable[Group]) -> Removal:
    """Return one unit in the middle of each group."""
    return {group.name: torch.tensor([group.units // 2]) for group in groups}


def unevenly(groups: Iterable[Group]) -> Removal:
    """Return more units of one group than of an equally large one, so that axes of one length by chance differ."""
    return _by_digit(groups, 0)


def unevenly_again(groups: Iterable[Group]) -> Removal:
    """Return other numbers of units where `unevenly` had to take as many of several; nothing where it had not."""
    return _by_digit(groups, 1)


def _by_digit(groups: Iterable[Group], digit: int) -> Removal:
    removal: dict[str, torch.Tensor] = {}
    met = Counter[int]()
    for group in groups:
        most = max(1, group.units // 2)
        removal[group.name] = torch.arange(1 + met[group.units] // most**digit % most)
        met[group.units] += 1
    enough = digit > 0 and all(count <= max(1, units // 2) for units, count in met.items())
    return {} if enough else removal


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
