"""What must hold of any model's groups: half of all units is removed at once, and everything is checked.

The oracle knows no architecture. It reads the groups and checks them against the model's own behaviour.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from rarefy.dependencies.groups import Claims, Dependencies, Group, tensors
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = tuple[Any, ...]
Removal = dict[str, torch.Tensor]
Engine = ModuleType | SimpleNamespace
"""What has `find_dependencies`, `cut` and `mask`."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error of an output, relative to the largest output. Many models round to float32 inside."""

FAINT = 1e-9
"""What a masked slice is multiplied by where it cannot be zero."""


@dataclass
class Record:
    """What was found out about one model."""

    measured: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def attempt(self, check: str, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, or None with a failure noted when it raises."""
        try:
            return work()
        except Exception as error:
            self.failures.append({"check": check, "error": first_line(error), "place": place(error)})
            return None

    def demand(self, holds: bool, check: str, text: str) -> None:
        """Note a failure when something does not hold."""
        if not holds:
            self.failures.append({"check": check, "error": text, "place": ""})


def examine(model: nn.Module, inputs: Inputs, engine: Engine) -> Record:
    """Find the groups of a model, remove half of their units and check all that must hold."""
    record = Record()
    randomise_(model.eval())
    began = time.perf_counter()
    outputs = record.attempt("forward", lambda: run(model, inputs))
    if outputs is None:
        return record
    record.measured["forward_seconds"] = time.perf_counter() - began
    record.demand(any(varies(x) for x in outputs), "forward", "the outputs are constant")
    same = zip(outputs, run(model, inputs), strict=True)
    record.demand(all(torch.equal(a, b) for a, b in same), "forward", "two runs differ")
    began = time.perf_counter()
    found = record.attempt("analysis", lambda: engine.find_dependencies(model, inputs))
    if found is None:
        return record
    record.measured["analysis_seconds"] = time.perf_counter() - began
    record.measured |= shares(model, found)
    exact, exact_inputs = in_double(model, inputs)
    variants = {first: choose(model, found.groups, first) for first in ("block", "position")}
    if {*variants["block"]} == {*variants["position"]}:
        del variants["position"]
    for first, removal in variants.items():
        check_removal(record, first, exact, exact_inputs, found, removal, engine)
    return record


def check_removal(
    record: Record,
    variant: str,
    model: nn.Module,
    inputs: Inputs,
    found: Dependencies,
    removal: Removal,
    engine: Engine,
) -> None:
    """Check one removal of everything, and one of what does not change statistics."""
    calm = {name: units for name, units in removal.items() if not found[name].changes_statistics}
    if calm:
        record.attempt(f"masked outputs ({variant})", lambda: check_masked(record, model, inputs, found, calm, engine))
    if not removal:
        return
    began = time.perf_counter()
    compact = record.attempt(f"cut ({variant})", lambda: engine.cut(model, found, removal))
    if compact is None:
        return
    record.measured.setdefault("cut_seconds", time.perf_counter() - began)
    check_tensors(record, variant, model, compact, found, removal)
    if record.attempt(f"compact runs ({variant})", lambda: check_runs(model, compact, inputs)) is None:
        return
    again = record.attempt(f"second analysis ({variant})", lambda: engine.find_dependencies(compact, inputs))
    if again is not None:
        check_again(record, variant, compact, found, again, removal)


# --- the checks -------------------------------------------------------------------------------------------------------


def check_masked(
    record: Record, model: nn.Module, inputs: Inputs, found: Dependencies, removal: Removal, engine: Engine
) -> None:
    """Demand that the compact model's outputs equal the masked model's, and note how much the removal matters."""
    masked = run(engine.mask(model, found, removal), inputs)
    if not all(output.isfinite().all() for output in masked):
        # a weight divided by its norm: zero has no direction, but almost zero has
        masked = run(engine.mask(model, found, removal, FAINT), inputs)
    compact = run(engine.cut(model, found, removal), inputs)
    errors = [distance(a, b) for a, b in zip(masked, compact, strict=True)]
    effects = [distance(a, b) for a, b in zip(run(model, inputs), masked, strict=True)]
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    record.measured["error"] = max(record.measured.get("error", 0.0), *errors)
    record.measured["effect"] = max(record.measured.get("effect", 0.0), *effects)
    if not max(errors) <= tolerance:
        raise AssertionError(f"compact and masked outputs differ by {max(errors):.1e}, tolerance {tolerance:.0e}")


def check_runs(model: nn.Module, compact: nn.Module, inputs: Inputs) -> bool:
    """Demand that the compact model gives outputs of the same shapes, all finite."""
    for before, after in zip(run(model, inputs), run(compact, inputs), strict=True):
        if before.shape != after.shape:
            raise AssertionError(f"an output of shape {tuple(before.shape)} became {tuple(after.shape)}")
        if before.isfinite().all() and not after.isfinite().all():
            raise AssertionError("the outputs are no longer finite")
    return True


def check_tensors(
    record: Record, variant: str, model: nn.Module, compact: nn.Module, found: Dependencies, removal: Removal
) -> None:
    """Demand that each tensor lost the union of its groups' members, and kept everything else as it was."""
    gone = positions(found.groups, removal)
    after = tensors(compact)
    for name, tensor in tensors(model).items():
        kept = tensor
        for dim, size in enumerate(tensor.shape):
            stays = [i for i in range(size) if i not in gone[name, dim]]
            kept = kept.index_select(dim, torch.tensor(stays, dtype=torch.int64)) if len(stays) < size else kept
        same = name in after and after[name].shape == kept.shape and torch.equal(after[name].detach(), kept.detach())
        record.demand(same, f"removed elements ({variant})", f"{name} lost something else than its members")


def check_again(
    record: Record, variant: str, compact: nn.Module, found: Dependencies, again: Dependencies, removal: Removal
) -> None:
    """Demand of a second analysis that all indices exist, and that it finds the very units that remain."""
    sizes = {name: tensor.shape for name, tensor in tensors(compact).items()}
    for group in (*again.groups, *again.pinned):
        for member in group.members:
            fits = member.tensor in sizes and int(member.indices.min()) >= 0
            fits = fits and int(member.indices.max()) < sizes[member.tensor][member.dim]
            record.demand(fits, f"dangling indices ({variant})", f"{group.name}: {member.tensor}, {member.dim}")
    seen = {unit for group in (*again.groups, *again.pinned) for unit in units(group)}
    gone = positions(found.groups, removal)
    for name, without in removal.items():
        group = found[name]
        expected = remaining(group, without, gone)
        # with one unit left a dimension has one place, and what is tied by it may come apart
        lost = [unit for unit in expected if unit not in seen] if len(expected) > 1 else []
        text = f"{name}: {len(lost)} of the {len(expected)} units that remain are others in a second analysis"
        record.demand(not lost, f"second units ({variant})", text)


# --- what is removed, and what that covers ----------------------------------------------------------------------------


def choose(model: nn.Module, groups: tuple[Group, ...], first: str) -> Removal:
    """Choose half of the units of every group, of overlapping ones of the first kind of structure only."""
    draw = torch.Generator().manual_seed(0)
    claims = Claims()
    removal = {}
    for group in sorted(groups, key=lambda group: group.kind != first):
        if group.units < 2 or claims.take(group) is not None:
            continue
        removal[group.name] = torch.randperm(group.units, generator=draw)[: group.units // 2].sort().values
    return removal


def positions(groups: tuple[Group, ...], removal: Removal | None = None) -> dict[tuple[str, int], set[int]]:
    """Return the positions of each (tensor, dimension) that some groups' units, or those removed, take up."""
    union: dict[tuple[str, int], set[int]] = defaultdict(set)
    for group in groups:
        if removal is None or group.name in removal:
            for member in group.members:
                rows = member.indices if removal is None else member.indices[removal[group.name]]
                union[member.tensor, member.dim] |= set(rows.flatten().tolist())
    return union


Unit = frozenset[tuple[str, int, tuple[int, ...]]]
"""The positions of a unit in each tensor and dimension."""


def units(group: Group) -> list[Unit]:
    """Return the units of a group as sets of places, members that repeat counted once."""
    parts = [(member.tensor, member.dim, member.indices.tolist()) for member in group.members]
    result = []
    for unit in range(group.units):
        merged: dict[tuple[str, int], set[int]] = defaultdict(set)
        for name, dim, rows in parts:
            merged[name, dim] |= set(rows[unit])
        result.append(frozenset((*key, tuple(sorted(places))) for key, places in merged.items()))
    return result


def remaining(group: Group, without: torch.Tensor, gone: dict[tuple[str, int], set[int]]) -> list[Unit]:
    """Return the units that remain of a group, at the positions they have after everything in `gone` is cut."""
    ranks = {}
    for member in group.members:
        cut_away = torch.tensor(sorted(gone[member.tensor, member.dim]), dtype=torch.int64)
        ranks[member.tensor, member.dim] = cut_away
    left = set(range(group.units)) - set(without.tolist())
    moved = []
    for number, unit in enumerate(units(group)):
        if number in left:
            moved.append(frozenset((name, dim, shifted(places, ranks[name, dim])) for name, dim, places in unit))
    return moved


def shifted(places: tuple[int, ...], gone: torch.Tensor) -> tuple[int, ...]:
    """Return where places lie once the sorted positions in `gone` are missing."""
    old = torch.tensor(places, dtype=torch.int64)
    return tuple((old - torch.searchsorted(gone, old)).tolist())


def shares(model: nn.Module, found: Dependencies) -> dict[str, Any]:
    """Return which share of the parameters lies in a group that may be cut, and why the others may not."""
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    reasons: dict[str, list[Group]] = defaultdict(list)
    for group in found.pinned:
        reasons[group.pinned or ""].append(group)
    prunable = covered(parameters, positions(found.groups)) / total
    return {
        "parameters": total,
        "groups": len(found.groups),
        "units": sum(group.units for group in found.groups),
        "prunable_share": prunable,
        "pinned_share": 1 - prunable,
        "reasons": {
            reason: {"groups": len(groups), "share": covered(parameters, positions(tuple(groups))) / total}
            for reason, groups in reasons.items()
        },
    }


def covered(parameters: dict[str, nn.Parameter], union: dict[tuple[str, int], set[int]]) -> float:
    """Count the elements that lie in a slice of any dimension."""
    elements = 0.0
    for name, parameter in parameters.items():
        outside = 1.0
        for dim, size in enumerate(parameter.shape):
            outside *= 1 - len(union[name, dim]) / max(size, 1)
        elements += parameter.numel() * (1 - outside)
    return elements


# --- models and outputs -----------------------------------------------------------------------------------------------


def randomise_(model: nn.Module) -> None:
    """Move all parameters and running statistics off zero, one and other constants, in place."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                spread = 0.1 if parameter.dim() < 2 or not varies(parameter) else 0.1 * float(parameter.std())
                parameter += spread * torch.randn(parameter.shape, generator=draw)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))


def in_double(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return the model and its inputs in double precision, or as they are where it does not run so or overflows."""
    double = copy.deepcopy(model).double()
    wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)
    try:
        usable = all(output.isfinite().all() for output in run(double, wide))
    except Exception:
        usable = False
    return (double, wide) if usable else (model, inputs)


def run(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return the floating-point tensors among a model's outputs."""
    with torch.no_grad():
        return list(floats(model(*inputs)))


def floats(outputs: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in any nesting."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf


def varies(tensor: torch.Tensor) -> bool:
    """Return whether the values differ among themselves."""
    return bool(tensor.numel() > 1 and tensor.max() - tensor.min() > 1e-6 * tensor.abs().max())


def distance(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest reference; infinite where shapes or infinities differ."""
    if reference.shape != other.shape or not torch.equal(reference.isfinite(), other.isfinite()):
        return float("inf")
    reference, other = reference.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    return float((reference - other).abs().max() / reference.abs().max().clamp_min(1e-30)) if reference.numel() else 0.0


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def place(error: BaseException) -> str:
    """Return where an error arose, and the last line of the model's own code before."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not any(part in f.filename for part in ("/torch/", "/rarefy/", "/benchmarks/"))]
    return " < ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in (frames[-1:] + theirs[-1:]))
