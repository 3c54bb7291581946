"""Try the groups on a copy: what does not run when cut, or does not compute the same, is pinned."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rarefy.dependencies.cutting import cut
from rarefy.dependencies.finding import Inputs, observe, on_meta
from rarefy.dependencies.groups import Claims, Dependencies, Group, Length, Removal, tensors
from rarefy.dependencies.trials import (
    FAINT,
    Trial,
    every_other,
    exact,
    explained,
    finite,
    follow,
    has_twins,
    lively,
    one_of_each,
    rough,
    run,
    same_outputs,
    unevenly,
    unevenly_again,
    without,
)
from rarefy.errors import StageError
from rarefy.modules.skeleton import meta_copy
from rarefy.soundness import refuse_wrapped

_MOST_CHOICES = 64
_MOST_SEARCHES = 4
_MOST_PAIRED = 6
_Place = tuple[str, str, int | None]
"""A number in an attribute: module, attribute, and its place in a tuple or list."""
_Attribute = tuple[str, str, int | None, int]
"""A number in an attribute, by class of module, and how many axes it may stand for; instances may see fewer."""


def find_dependencies(model: nn.Module, inputs: Inputs, *, verify: bool = True) -> Dependencies:
    """Return what must be cut together in `model`, found by one run on `inputs`, its positional arguments.

    Every group is tried: a copy with one unit less of each runs on the inputs, and one with half of them gives what
    the model with the others zeroed gives; under a mean or variance, what a model with pairs of equal units gives.
    Groups over which a sum is shared or a scale depends on their number are tried for running only. Groups that fail
    are pinned with the place of the failure. Without `verify` nothing is tried, which is faster; code that has widths
    written into it is then found out by the first run after a cut. `model` is not changed. Raises `StageError` when it
    does not run on the inputs.
    """
    refuse_wrapped(model)
    _refuse_unready(model, inputs)
    settling = _Settling(model, inputs)
    return settling.settle() if verify else settling.found


def _refuse_unready(model: nn.Module, inputs: Inputs) -> None:
    if isinstance(inputs, torch.Tensor):
        raise StageError("inputs are the model's positional arguments: pass a tuple, `(x,)` for one tensor")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise StageError(
                f"the module {name!r} is a ScriptModule, which runs no Python: use the one it was made from"
            )
    for name, tensor in tensors(model).items():
        if is_lazy(tensor):
            raise StageError(f"{name!r} has no shape yet; run the model once on example inputs")
        if tensor.is_meta:
            raise StageError(f"{name!r} is on the meta device and has no values; load the weights first")


@dataclass(frozen=True)
class _Failure:
    """Where a cut copy failed and why."""

    module: str
    reason: str


class _Settling:
    """The search for what can be cut: each failure says more of the labels, until none is left."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.run = observe(model, inputs)
        self.given, self.inputs = model, inputs
        self.classes = {name: type(module).__name__ for name, module in model.named_modules()}
        self.chosen: dict[_Attribute, int] = {}
        """Which of the axes seen an attribute stands for, by class of module and attribute; -1 for none."""
        self.searches = Counter[str]()
        """How often the attributes of each class of modules were searched for other meanings."""
        self.shared: set[_Attribute] = set()
        """Attributes whose axes were tried apart."""
        self.last: dict[Any, _Failure | None] = {}
        self.trials: dict[Callable[[nn.Module, Inputs], Trial], Trial] = {}
        """What cuts are compared on, made once each."""
        self.united = False
        """Whether groups were tied because they fail alone."""
        self._take()

    def settle(self) -> Dependencies:
        """Try, correct, tie and pin until all trials pass."""
        while self._improve():
            self._take()
        return self.found

    def _take(self) -> None:
        """Read the groups from what is known of the labels by now."""
        found = self.run.groups()
        self.candidates: dict[_Place, list[Length]] = defaultdict(list)
        for length in found.lengths:
            self.candidates[length.module, length.attribute, length.item].append(length)
        self.found = replace(found, lengths=tuple(self._lengths()))
        self.groups = {group.name: group for group in found.groups}

    def _lengths(self) -> Iterator[Length]:
        for place, axes in self.candidates.items():
            choice = self.chosen.get(self._attribute(place), 0)
            if choice >= 0:
                yield axes[choice]

    def _attribute(self, place: _Place) -> _Attribute:
        module, attribute, item = place
        return self.classes.get(module, ""), attribute, item, len(self.candidates[place])

    def _rounds(self, among: Iterable[str] | None = None) -> list[list[str]]:
        """Return sets of groups that can be cut together: of those that overlap, whole blocks first, then places."""
        names = list(self.groups if among is None else among)
        apart = [name for name in names if not self.groups[name].overlaps]
        crossing = [name for name in names if self.groups[name].overlaps]
        rounds: list[list[str]] = []
        while crossing or not rounds:
            claims = Claims()
            blocks_first = sorted(crossing, key=lambda name: self.groups[name].kind != "block")
            now = [name for name in blocks_first if claims.take(self.groups[name]) is None]
            crossing = [name for name in crossing if name not in now]
            rounds.append(apart + now if not rounds else now)
        return [names for names in rounds if names]

    def _improve(self) -> bool:
        """Learn from the first trial that fails; tell whether there was one."""
        for names in self._rounds():
            if (failure := self._failure(names)) is not None:
                if not self._choose_again(names, failure):
                    self._pin_culprits(names, failure)
                return True
        for key, sets in self._shared_attributes().items():
            self.shared.add(key)
            failures = {i: found for i, names in enumerate(sets) if (found := self._first(names)) is not None}
            if len(failures) > 1:
                self._tie(key, set(failures))
                return True
            for i, failure in failures.items():
                self._pin_culprits(sets[i], failure)
                return True
        for names, choose in itertools.product(self._rounds(), (unevenly, unevenly_again)):
            if (failure := self._failure(names, choose)) is not None:
                self._tie_or_pin(names, failure)
                return True
        if self.united and self._pin_what_fails_alone():
            return True
        # one comparison of all, which most networks pass, before those that tell who is to blame
        changed = [self._make_equal(names) for names in self._rounds() if not self._equal(names, rough)]
        return any(changed)

    def _make_equal(self, round_: Sequence[str]) -> bool:
        """Correct other attributes, or pin, where a cut gives other outputs; tell whether one did."""
        unlike = self._unlike(round_)
        for kind in self._classes_with_lengths_of(unlike):
            if self._search(kind, lambda: self._equal(unlike)):
                return True
        for name in unlike:
            wanted = "a mean and a variance" if self.groups[name].changes_statistics else "zeroing it does"
            self._pin(name, f"cutting it changes more than {wanted}")
        return bool(unlike)

    def _classes_with_lengths_of(self, names: Sequence[str]) -> list[str]:
        """Return the classes of modules that may have written down an axis that the groups shorten."""
        return list(
            dict.fromkeys(
                self.classes[length.module]
                for lengths in self.candidates.values()
                for length in lengths
                if any(name in names for name, _ in length.parts)
            )
        )

    def _first(self, among: Iterable[str]) -> _Failure | None:
        """Return the first failure of the groups, those that overlap tried apart."""
        return next((found for names in self._rounds(among) if (found := self._failure(names)) is not None), None)

    def _failure(
        self, names: Iterable[str], choose: Callable[[Iterable[Group]], Removal] = one_of_each
    ) -> _Failure | None:
        """Return how a copy without some units of each group fails to run, None when it runs; the last is kept."""
        key = (frozenset(names), tuple(self.found.lengths), choose)
        if key not in self.last:
            removal = choose([self.groups[name] for name in sorted(key[0])])
            self.last = {key: None if not removal or self._runs_on_meta(removal) else self._tried(removal)}
        return self.last[key]

    def _runs_on_meta(self, removal: Removal) -> bool:
        """Tell whether a cut runs without values; if it does not, that may be for want of values."""
        if not self.run.trace.valueless:
            return False
        try:
            run(cut(self.shadow, self.found, removal), on_meta(self.inputs))
        except Exception:
            return False
        return True

    def _tried(self, removal: Removal) -> _Failure | None:
        """Return how a cut fails to run."""
        compact = cut(self.model, self.found, removal)
        stack = follow(compact)
        try:
            run(compact, self.inputs)
        except Exception as error:
            return _Failure(stack[-1] if stack else "", explained(error))
        return None

    @cached_property
    def shadow(self) -> nn.Module:
        """The model without values."""
        return meta_copy(self.given)

    def _choose_again(self, names: Sequence[str], failure: _Failure) -> bool:
        """Find other meanings of the attributes of the module that failed; tell whether that helped."""
        kind = self.classes.get(failure.module, "")

        def passes() -> bool:
            now = self._failure(names)
            return now is None or self.classes.get(now.module) != kind

        return self._search(kind, passes)

    def _search(self, kind: str, passes: Callable[[], bool]) -> bool:
        """Choose other axes, or none, for as few attributes of a class of modules as it takes; tell whether any do."""
        self.searches[kind] += 1
        if self.searches[kind] > _MOST_SEARCHES:
            return False
        before = dict(self.chosen)
        attributes = dict.fromkeys(key for key in map(self._attribute, self.candidates) if key[0] == kind)
        others = {key: [i for i in range(-1, key[-1]) if i != before.get(key, 0)] for key in attributes}
        for choice in itertools.islice(_few_first(others), _MOST_CHOICES):
            self.chosen = {**before, **choice}
            self.found = replace(self.found, lengths=tuple(self._lengths()))
            if passes():
                return True
        self.chosen = before
        self.found = replace(self.found, lengths=tuple(self._lengths()))
        return False

    def _pin_culprits(self, names: Sequence[str], failure: _Failure) -> None:
        """Pin the groups that fail alone; when none does, all that touch the module that failed."""
        near = [name for name in names if self._touches(name, failure.module)] or list(names)
        alone = {name: found for name in near if (found := self._failure([name])) is not None}
        for name in alone or near:
            self._pin(name, alone.get(name, failure).reason)

    def _tie_or_pin(self, names: Sequence[str], failure: _Failure) -> None:
        """Tie groups that run only when as many units of each are gone, and pin those that fail anyhow."""
        near = [name for name in names if self._touches(name, failure.module)] or list(names)
        # what has to go with them may be elsewhere
        if self._tie_equal(near) or self._tie_equal(names):
            return
        alone = {name: found for name in near if (found := self._failure([name])) is not None}
        for name in alone or near:
            self._pin(name, alone.get(name, failure).reason)

    def _tie_equal(self, names: Sequence[str]) -> bool:
        """Tie those of the groups that fail alone and run together; tell whether there are any."""
        alone = [name for name in names if self._failure([name]) is not None]
        tied: set[str] = set()
        for count in dict.fromkeys(self.groups[name].units for name in alone):
            alike = [name for name in alone if self.groups[name].units == count]
            pairs = [list(pair) for pair in itertools.combinations(alike[:_MOST_PAIRED], 2)]
            for some in (*pairs, alike):
                if len(some) > 1 and not tied.issuperset(some) and self._failure(some) is None:
                    self.run.unite(some)
                    self.united = True
                    tied.update(some)
        return bool(tied)

    def _pin_what_fails_alone(self) -> bool:
        """Pin the groups that fail when no other is cut; tell whether there are any.

        Ties by equal numbers of units may leave some that agree with others by chance.
        """
        found: dict[str, _Failure] = {}
        for name, choose in itertools.product(self.groups, (one_of_each, every_other)):
            if name not in found and (failure := self._failure([name], choose)) is not None:
                found[name] = failure
        for name, failure in found.items():
            self._pin(name, failure.reason)
        return bool(found)

    def _touches(self, name: str, module: str) -> bool:
        """Tell whether a group has a member in a module or beside it."""
        parent = module.rpartition(".")[0]
        return any(member.tensor.startswith(f"{parent}." if parent else "") for member in self.groups[name].members)

    def _shared_attributes(self) -> dict[_Attribute, list[list[str]]]:
        """Return the groups that shorten each of the axes of attributes with several, by class of module."""
        axes: dict[_Attribute, list[set[str]]] = defaultdict(list)
        for place, lengths in self.candidates.items():
            key = self._attribute(place)
            if len(lengths) > 1 and key not in self.shared:
                for i, length in enumerate(lengths):
                    axes[key] += [set() for _ in range(i + 1 - len(axes[key]))]
                    axes[key][i] |= {name for name, _ in length.parts}
        return {key: [sorted(names & self.groups.keys()) for names in sets] for key, sets in axes.items()}

    def _tie(self, key: _Attribute, which: set[int]) -> None:
        """Make axes that one attribute stands for change together, in every module of the class."""
        for place, lengths in self.candidates.items():
            if self._attribute(place) == key:
                self.run.tie([length for i, length in enumerate(lengths) if i in which])

    def _unlike(self, names: Sequence[str], beside: Sequence[str] = ()) -> list[str]:
        """Return the groups that are not equal when they are cut beside others, by halving."""
        if self._equal([*beside, *names]):
            return []
        if len(names) == 1:
            return list(names)
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        # where each half is equal alone, the second is to blame beside the first
        return [*self._unlike(first, beside), *self._unlike(second, beside)] or self._unlike(second, [*beside, *first])

    def _equal(self, names: Sequence[str], trial: Callable[[nn.Module, Inputs], Trial] = exact) -> bool:
        """Compare a cut of every other unit with a model that computes as much without being cut."""
        removal = every_other(self.groups[name] for name in names if self._comparable(self.groups[name]))
        if not removal:
            return True
        if trial not in self.trials:
            self.trials[trial] = trial(self.model, self.inputs)
        model, inputs, tolerance = self.trials[trial]
        try:
            compact = run(cut(model, self.found, removal), inputs)
            whole = run(without(model, self.found, removal), inputs)
            if same_outputs(compact, whole, tolerance):
                return True
            # where a weight is divided by its norm, zero has no direction; almost zero has
            faint = run(without(model, self.found, removal, FAINT), inputs)
        except Exception:  # whatever its own code raises
            return False
        return not finite(whole) and same_outputs(compact, faint, 1e-3)

    def _comparable(self, group: Group) -> bool:
        """Tell whether there is something to compare a cut with.

        A tensor that makes the units and reads them, as an embedding tied to the output layer, can neither be a copy
        nor be zero.
        """
        if not group.changes_statistics:
            return True
        both = any(member.reads and member.tensor in self.makers for member in group.members)
        return group.name not in self.run.ratios and has_twins(group) and not both

    @cached_property
    def makers(self) -> set[str]:
        """The tensors that are embeddings, whatever else they are."""
        modules = dict(self.given.named_modules())
        found = [m.weight for m in modules.values() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        return {name for name, tensor in tensors(self.given).items() if any(tensor is weight for weight in found)}

    @cached_property
    def model(self) -> nn.Module:
        """The model of the trials."""
        return lively(self.given)

    def _pin(self, name: str, reason: str) -> None:
        self.run.pin(name, reason)


def _few_first(others: Mapping[_Attribute, list[int]]) -> Iterator[dict[_Attribute, int]]:
    """Yield other meanings for one attribute, then for two, and so on."""
    for size in range(1, len(others) + 1):
        for keys in itertools.combinations(others, size):
            for axes in itertools.product(*(others[key] for key in keys)):
                yield dict(zip(keys, axes, strict=True))
