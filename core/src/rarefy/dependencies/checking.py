"""Try the groups on a copy: what does not run when cut, or does not compute the same, is pinned."""

from __future__ import annotations

import itertools
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.dependencies.cutting import cut, mask
from rarefy.dependencies.finding import Inputs, find_groups
from rarefy.dependencies.groups import Dependencies, Group, Length, Removal
from rarefy.errors import StageError

_MOST_CHOICES = 64
_TORCH = str(Path(torch.__file__).parent)


def find_dependencies(model: nn.Module, inputs: Inputs) -> Dependencies:
    """Return what must be cut together in `model`, found by one run on `inputs`, its positional arguments.

    Every group was tried: a copy with one unit less of each ran on the inputs and, apart from groups that change
    statistics, gave what the model with these units zeroed gives. Groups that failed are pinned with the place of the
    failure. `model` is not changed. Raises `StageError` when it does not run on the inputs.
    """
    _refuse_wrapped(model)
    return _Settling(model, inputs, find_groups(model, inputs)).settle()


def _refuse_wrapped(model: nn.Module) -> None:
    wrapped = {
        "DistributedDataParallel": "pass its `.module`",
        "DataParallel": "pass its `.module`",
        "FullyShardedDataParallel": "unshard it and pass the model within",
        "OptimizedModule": "pass the model given to torch.compile, its `._orig_mod`, and compile the result",
        "RecursiveScriptModule": "pass the Python model it was scripted from",
    }
    kind = type(model).__name__
    if kind in wrapped:
        raise StageError(f"a {kind} cannot be analyzed: {wrapped[kind]}")


@dataclass(frozen=True)
class _Failure:
    """Where a cut copy failed and why."""

    module: str
    reason: str


class _Settling:
    """The search for what can be cut."""

    def __init__(self, model: nn.Module, inputs: Inputs, found: Dependencies) -> None:
        self.model, self.inputs = model, inputs
        self.groups = {group.name: group for group in found.groups if group.units > 1}
        single = "it is one unit, and something has to stay"
        self.pinned = [*found.pinned, *(replace(g, pinned=single) for g in found.groups if g.units == 1)]
        self.lengths = found.lengths
        self.classes = {name: type(module).__name__ for name, module in model.named_modules()}
        self.chosen: dict[tuple[str, str, int | None], int] = {}
        """Which of the axes seen an attribute stands for, by class of module and attribute; -1 for none."""
        self.tried: set[str] = set()

    def settle(self) -> Dependencies:
        """Try, correct and pin until a trial passes."""
        while self.groups and (failure := self._failure(self.groups)) is not None:
            if not self._choose_again(failure):
                self._pin_culprits(failure)
        same = [name for name, group in self.groups.items() if not group.changes_statistics]
        for name in self._unlike(same):
            self._pin(name, "cutting it changes more than zeroing it does")
        return self._dependencies()

    def _dependencies(self) -> Dependencies:
        return Dependencies(tuple(self.groups.values()), tuple(self.pinned), tuple(self._settled_lengths()))

    def _settled_lengths(self) -> Iterator[Length]:
        seen: dict[tuple[str, str, int | None], list[Length]] = defaultdict(list)
        for length in self.lengths:
            seen[length.module, length.attribute, length.item].append(length)
        for (module, attribute, item), candidates in seen.items():
            choice = self.chosen.get((self.classes.get(module, ""), attribute, item), 0)
            if 0 <= choice < len(candidates):
                yield candidates[choice]

    def _failure(self, names: Iterable[str]) -> _Failure | None:
        """Return how a copy without one unit of each group fails to run, None when it runs."""
        compact = cut(self.model, self._dependencies(), _one_of_each(self.groups[name] for name in names))
        stack: list[str] = []
        with _followed(compact, stack):
            try:
                _run(compact, self.inputs)
            except Exception as error:
                return _Failure(stack[-1] if stack else "", _explained(error))
        return None

    def _choose_again(self, failure: _Failure) -> bool:
        """Find other meanings of the attributes of the module that failed; tell whether that helped."""
        kind = self.classes.get(failure.module, "")
        if kind in self.tried:
            return False
        self.tried.add(kind)
        options: dict[tuple[str, str, int | None], int] = {}
        counts: dict[tuple[str, str, int | None], int] = defaultdict(int)
        for length in self.lengths:
            if self.classes.get(length.module) == kind:
                counts[length.module, length.attribute, length.item] += 1
        for (_, attribute, item), count in counts.items():
            options[kind, attribute, item] = max(count, options.get((kind, attribute, item), 0))
        before = dict(self.chosen)
        choices = itertools.product(*([*range(count), -1] for count in options.values()))
        for choice in itertools.islice(choices, _MOST_CHOICES):
            self.chosen = {**before, **dict(zip(options, choice, strict=True))}
            now = self._failure(self.groups)
            if now is None or self.classes.get(now.module) != kind:
                return True
        self.chosen = before
        return False

    def _pin_culprits(self, failure: _Failure) -> None:
        """Pin the groups that fail alone; when none does, all that touch the module that failed."""
        near = [name for name in self.groups if self._touches(name, failure.module)] or list(self.groups)
        alone = {name: found for name in near if (found := self._failure([name])) is not None}
        for name in near if not alone else alone:
            self._pin(name, alone.get(name, failure).reason)

    def _touches(self, name: str, module: str) -> bool:
        prefix = f"{module}." if module else ""
        parent = prefix.removesuffix(".").rpartition(".")[0]
        members = [member.tensor for member in self.groups[name].members]
        if any(tensor.startswith(prefix) for tensor in members):
            return True
        return any(tensor.startswith(f"{parent}." if parent else "") for tensor in members)

    def _unlike(self, names: Sequence[str]) -> list[str]:
        """Return the groups whose cut gives other outputs than their zeroing, by halving."""
        if not names or self._equal(names):
            return []
        if len(names) == 1:
            return list(names)
        half = len(names) // 2
        return [*self._unlike(names[:half]), *self._unlike(names[half:])]

    def _equal(self, names: Sequence[str]) -> bool:
        removal = _one_of_each(self.groups[name] for name in names)
        found = self._dependencies()
        compact = _run(cut(self.model, found, removal), self.inputs)
        return same_outputs(compact, _run(mask(self.model, found, removal), self.inputs))

    def _pin(self, name: str, reason: str) -> None:
        self.pinned.append(replace(self.groups.pop(name), pinned=reason))


def same_outputs(one: Any, other: Any, tolerance: float = 1e-3) -> bool:
    """Tell whether two outputs are equal to a tolerance relative to their largest value, wider in half precision."""
    pairs = list(itertools.zip_longest(tree_leaves(one), tree_leaves(other)))
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


def _one_of_each(groups: Iterable[Group]) -> Removal:
    return {group.name: torch.tensor([group.units // 2]) for group in groups}


def _run(model: nn.Module, inputs: Inputs) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return model.eval()(*inputs)


@contextmanager
def _followed(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the running modules in `stack`, also when one fails."""

    def enter(name: str) -> Any:
        return lambda module, args: stack.append(name)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)
    yield


def _explained(error: Exception) -> str:
    """Return the message with the place in the model's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_TORCH) and Path(f.filename).parent != Path(__file__).parent]
    place = f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"the model does not run without one of its units{place}: {first}"
