"""From a model to its spec: how it differs from its base."""

from __future__ import annotations

from typing import Any

from rarefy_schemas import ModelReference, ModelSpec, ModuleSpec
from torch import nn

from rarefy.errors import ArtifactError
from rarefy.modules.construction import build
from rarefy.modules.kinds import UnregisteredError, construct, kind_of, specify
from rarefy.modules.plain import is_plain, same, to_json
from rarefy.modules.skeleton import Base, skeleton, state
from rarefy.registry import get

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def describe(model: nn.Module, base: Base) -> ModelSpec:
    """Return how `model` differs from `base`: replaced submodules, changed plain attributes, tied tensors.

    When every class is registered and nobody else could build the base (it has no reference, or one to the user's
    own code), the spec is the whole network instead, so that the file loads anywhere. Raises `ArtifactError` when
    the model holds something that a spec cannot say: a class that is not registered, a hook, a tensor that its class
    does not make.
    """
    differences = _Differences()
    if is_own_code(base.reference):
        try:
            differences.replace(model, "")
        except ArtifactError:
            differences = _Differences()
    if "" not in differences.modules:
        made = skeleton(base)
        base = Base(lambda: made, base.reference)
        differences.compare(model, made, "")
    root = differences.modules.pop("", None)
    spec = ModelSpec(
        base=base.reference if root is None else None, root=root, modules=differences.modules, ties=_ties(model)
    )
    spec = spec.model_copy(update={"attributes": _attributes(model, build(spec, base))})
    _check_same_structure(model, build(spec, base))
    return spec


def is_own_code(reference: ModelReference | None) -> bool:
    """Tell whether a base is the user's code, which no one else may have and no file may run."""
    if reference is None:
        return True
    scheme, colon, _ = reference.source.partition(":")
    return not colon or scheme not in get().sources


class _Differences:
    """The outermost submodules that differ, parents before children."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleSpec] = {}
        # pairs of base module and model module, by identity of the former, which is kept alive here
        self.met: dict[int, tuple[nn.Module, nn.Module]] = {}

    def compare(self, model: nn.Module, base: nn.Module, name: str) -> None:
        """Collect where `model` differs from `base`."""
        # a module that the base has in two places may have become two
        if self.met.setdefault(id(base), (base, model))[1] is model and _same_construction(model, base):
            self._compare_children(model, base, name)
        else:
            self.replace(model, name)

    def replace(self, model: nn.Module, name: str) -> None:
        """Record that `model` stands at `name`; raise `UnregisteredError` when its class is not registered."""
        try:
            self.modules[name] = specify(model)
        except UnregisteredError as error:
            raise UnregisteredError(f"{_place(name)} differs from the base: {error}") from error
        made = construct(self.modules[name])
        if not _same_construction(model, made):
            raise ArtifactError(f"{_place(name)}, a {type(model).__name__}, does not come back from its own arguments")
        self._compare_children(model, made, name)

    def _compare_children(self, model: nn.Module, base: nn.Module, name: str) -> None:
        for leaf, child in model._modules.items():
            if child is None:
                continue
            place = f"{name}.{leaf}" if name else leaf
            other = base._modules.get(leaf)
            if other is None:
                self.replace(child, place)
            else:
                self.compare(child, other, place)


def _same_construction(model: nn.Module, base: nn.Module) -> bool:
    if type(model) is not type(base):
        return False
    kind = kind_of(model)
    if kind is None:
        return True
    if kind.container:
        return list(model._modules) == list(base._modules)
    try:
        one, other = kind.to_spec(model), kind.to_spec(base)
    except UnregisteredError:
        return True
    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


def _ties(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in state(model):
        if (known := first.setdefault(id(tensor), name)) != name:
            ties[name] = known
    return ties


def _attributes(model: nn.Module, built: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the plain attributes that the built model lacks, and None for each part that it has too much."""
    others = dict(built.named_modules(remove_duplicate=False))
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        other = others.get(name)
        if other is None or type(other) is not type(module):
            raise ArtifactError(f"{_place(name)}, a {type(module).__name__}, cannot be described against the base")
        changed = {
            key: to_json(value)
            for key, value in vars(module).items()
            if not key.startswith("_") and key != "training" and is_plain(value) and _differs(value, other, key)
        }
        for slot in ("_modules", "_parameters", "_buffers"):
            mine, theirs = vars(module)[slot], vars(other)[slot]
            changed.update({key: None for key in theirs if theirs[key] is not None and mine.get(key) is None})
        if changed:
            found[name] = changed
    return found


def _differs(value: Any, other: nn.Module, key: str) -> bool:
    if key not in vars(other):
        return True
    known = vars(other)[key]
    return not is_plain(known) or not same(value, known)


def _check_same_structure(model: nn.Module, built: nn.Module) -> None:
    """Raise `ArtifactError` when the spec's model is not the described one in all but values."""
    others = dict(built.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        other = others.pop(name, None)
        if other is None or type(other) is not type(module):
            raise ArtifactError(f"{_place(name)}, a {type(module).__name__}, cannot be described against the base")
        _check_same_code(module, other, name)
        _check_same_tensors(module, other, name)
    if others:
        raise ArtifactError(
            f"the base has {_place(next(iter(others)))} and the model has not; put torch.nn.Identity there instead"
        )


def _check_same_code(module: nn.Module, other: nn.Module, name: str) -> None:
    hooked = any(len(vars(module)[hooks]) != len(vars(other)[hooks]) for hooks in _HOOKS)
    if hooked or ("forward" in vars(module)) != ("forward" in vars(other)):
        raise ArtifactError(
            f"{_place(name)} has a hook or a replaced `forward`, which no file can hold; remove it in `consolidate`"
        )


def _check_same_tensors(module: nn.Module, other: nn.Module, name: str) -> None:
    for slot in ("_parameters", "_buffers"):
        mine = {key: value for key, value in vars(module)[slot].items() if value is not None}
        theirs = {key: value for key, value in vars(other)[slot].items() if value is not None}
        if extra := sorted(mine.keys() ^ theirs.keys()):
            raise ArtifactError(
                f"{_place(name)}, a {type(module).__name__}, has the tensors {sorted(mine)} and its class makes "
                f"{sorted(theirs)}; settle {extra[0]!r} in `consolidate`, or register a class that has it"
            )
        for key, value in mine.items():
            if kind_of(module) is not None and value.shape != theirs[key].shape:
                raise ArtifactError(
                    f"{_place(name)}: {key} has the shape {tuple(value.shape)}, but the module's attributes say "
                    f"{tuple(theirs[key].shape)}; bring the attributes (such as out_features) up to date"
                )


def _place(name: str) -> str:
    return f"module {name!r}" if name else "the network itself"
