"""Layers that write channels and layers that read them, with nothing in between that minds a factor per channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rarefy.dependencies import Group, Member, find_dependencies, same_outputs
from rarefy.folding import outputs_of
from rarefy.hessian import LAYERS
from rarefy.measure.mode import device_of, evaluation, move
from torch import nn
from torch.func import functional_call

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Link:
    """Channels that some layers write and some read, as slices of their tensors."""

    writers: tuple[Member, ...]
    readers: tuple[Member, ...]
    biases: tuple[Member, ...]
    """Biases of whatever adds to the channels."""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.writers[0].indices)

    @property
    def layers(self) -> list[str]:
        """The names of the layers, those that write first."""
        return [owner(member) for member in (*self.writers, *self.readers)]

    def scaled(self, tensors: Tensors, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors that change when what is written is divided by `scales`, `(channels,)`."""
        changed: dict[str, torch.Tensor] = {}
        divided = [(member, 1 / scales) for member in (*self.writers, *self.biases)]
        for member, factors in (*divided, *((member, scales) for member in self.readers)):
            # a tensor may be on both sides
            tensor = changed.get(member.tensor, tensors[member.tensor])
            whole = torch.ones(tensor.shape[member.dim], dtype=scales.dtype, device=tensor.device)
            whole[member.indices.to(tensor.device)] = factors.to(tensor.device).unsqueeze(1)
            shape = [-1 if dim == member.dim else 1 for dim in range(tensor.dim())]
            changed[member.tensor] = (tensor * whole.view(shape)).to(tensor.dtype)
        return changed


def ranges(members: tuple[Member, ...], tensors: Tensors) -> torch.Tensor:
    """Return the largest magnitude in the slices of each channel, `(channels,)`."""
    found = []
    for member in members:
        tensor = tensors[member.tensor]
        each = tensor.abs().movedim(member.dim, 0).flatten(1).amax(1)
        found.append(each[member.indices.to(tensor.device)].amax(1))
    return torch.stack(found).amax(0)


def owner(member: Member) -> str:
    """Return the name of the module that a tensor belongs to."""
    return member.tensor.rpartition(".")[0]


def links(model: nn.Module, inputs: tuple[Any, ...], allowed: set[str]) -> tuple[list[Link], dict[str, str]]:
    """Return the links between layers of `allowed`, and for each layer that writes without one the reason.

    Every link was tried: with its channels scaled by powers of two, which costs no precision, the model gives the same
    outputs on `inputs`. So no kind of activation is known here, and those that clip or bend are found out.
    """
    trial = _Trial(model, inputs)
    found: list[Link] = []
    reasons: dict[str, str] = {}
    dependencies = find_dependencies(model, move(inputs, device_of(model)), verify=False)
    for group in (*dependencies.groups, *dependencies.pinned):
        writers = [owner(m) for m in _writers(model, group)]
        reason = _obstacle(model, group, allowed)
        if reason is None:
            alternatives = (chain for chain in _chains(model, group, trial.order) if all(map(trial.passes, chain)))
            chain = next(alternatives, None)
            if chain is not None:
                found += chain
                continue
            reason = _guess(model, group)
        reasons.update(dict.fromkeys(writers, reason))
    linked = {name for link in found for name in link.layers}
    return found, {name: reason for name, reason in reasons.items() if name not in linked}


class _Trial:
    """What a model gives, to compare with what it gives when a link is scaled."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.model, self.inputs, self.order = model, move(inputs, device_of(model)), dict[str, int]()
        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: self._note(name))
            for name, module in model.named_modules()
        ]
        try:
            self.wanted = outputs_of(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def _note(self, name: str) -> None:
        self.order.setdefault(name, len(self.order))

    def passes(self, link: Link) -> bool:
        """Tell whether scaling the channels of a link leaves the outputs as they are."""
        exponents = torch.randint(-6, 7, (link.channels,), generator=torch.Generator().manual_seed(0))
        exponents[0] = -6
        changed = link.scaled(self.tensors, 2.0**exponents)
        with evaluation(self.model), torch.no_grad():
            return same_outputs(functional_call(self.model, changed, self.inputs), self.wanted, 1e-5)


def _chains(model: nn.Module, group: Group, order: Mapping[str, int]) -> Iterator[list[Link]]:
    """Yield ways to scale the channels of a group: with a link to and from each depthwise layer, or with one in all."""
    depthwise = sorted(
        (m for m in _weights(model, group) if _is_depthwise(model, m)), key=lambda m: order.get(owner(m), 0)
    )
    biases = tuple(m for m in group.members if m.tensor.endswith(".bias") and owner(m) in _layers(model))
    writers, readers = _writers(model, group), tuple(m for m in group.members if m.reads)
    if depthwise:
        steps = [writers, *((member,) for member in depthwise), readers]
        yield [
            Link(before, after, tuple(b for b in biases if owner(b) in map(owner, before)))
            for before, after in pairwise(steps)
        ]
    yield [Link(writers, readers, biases)]


def _obstacle(model: nn.Module, group: Group, allowed: set[str]) -> str | None:
    """Return why the channels of a group cannot be scaled, as far as that shows without trying."""
    if group.pinned is not None:
        return f"its channels cannot be scaled: {group.pinned}"
    if group.overlaps or group.kind != "channel":
        return "its channels go in blocks, as those of grouped convolutions and attention heads do"
    if not _writers(model, group) or not any(member.reads for member in group.members):
        return "there is no layer that reads its channels, or none that writes them"
    others = sorted({owner(m) for m in _weights(model, group)} - allowed)
    return f"its channels are also those of {others[0]!r}, which is no target" if others else None


def _guess(model: nn.Module, group: Group) -> str:
    """Return what is known of why scaling changes the outputs."""
    norms = sorted({owner(m) for m in group.members} - _layers(model))
    between = f"{norms[0]!r}, a {type(model.get_submodule(norms[0])).__name__}," if norms else "an activation that"
    rest = "stands between" if norms else "clips or bends stands between"
    return f"scaling its channels changes the outputs: {between} {rest} the layers"


def _weights(model: nn.Module, group: Group) -> list[Member]:
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
    return [member for member in group.members if dims.get(member.tensor, 0) > 1]


def _writers(model: nn.Module, group: Group) -> tuple[Member, ...]:
    """Return the rows of layers that write the channels, those of depthwise layers aside."""
    return tuple(
        m for m in _weights(model, group) if not m.reads and owner(m) in _layers(model) and not _is_depthwise(model, m)
    )


def _layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LAYERS)}


def _is_depthwise(model: nn.Module, member: Member) -> bool:
    layer = model.get_submodule(owner(member))
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", None) and not member.reads
