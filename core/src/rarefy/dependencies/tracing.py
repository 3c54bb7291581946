"""Run a model once and carry label fields beside its activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from rarefy.dependencies.cutting import follows
from rarefy.dependencies.fields import Algebra, Fields, along, axes
from rarefy.dependencies.labels import Ids

# attributes of torch's own layers that nothing but the run tells when the layer has no tensors
_WITHOUT_TENSORS = frozenset(["num_features", "normalized_shape", "num_channels"])
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
log = logging.getLogger("rarefy")

NUMBERED = "code picks it by its number"
CHOSEN = "data choose among its rows"
UNKNOWN = "it meets values that belong to no channel, such as the model's inputs or a constant"


@dataclass(frozen=True)
class Size:
    """An axis whose length a module may have written down in an attribute."""

    length: int
    labels: tuple[Ids, ...]
    """Labels along the axis; a place counts while none of its labels is removed."""
    attribute: str | None = None
    """The attribute that holds it, when that is known."""


@dataclass
class Call:
    """One call of an ATen operator."""

    name: str
    operator: Any
    arguments: Mapping[str, Any]
    out: Any
    shapes: Mapping[int, torch.Size]
    """Shapes before the call of the tensors that it changes in place, by identity."""

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        """Return the shape of an argument as it was before the call."""
        return self.shapes.get(id(tensor), tensor.shape)

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema."""
        return self.arguments[name]

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves(list(self.arguments.values())) if isinstance(leaf, torch.Tensor)]

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        """All tensors that came out."""
        return [leaf for leaf in tree_leaves(self.out) if isinstance(leaf, torch.Tensor)]


Rule = Callable[["Trace", Call], None]


@dataclass
class Trace:
    """What is known of a run so far."""

    names: dict[int, str]
    """Name of each parameter and buffer, by identity."""
    valueless: bool = False
    """Whether tensors hold no values; a rule that asks for some then ends the run."""
    algebra: Algebra = field(default_factory=Algebra)
    known: Any = field(default_factory=WeakIdKeyDictionary)
    """Fields of the activations that are alive."""
    atoms: dict[tuple[str, int], Ids] = field(default_factory=dict)
    """Labels of each dimension of the parameters and buffers that were met."""
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    """Axes seen while each module ran, by the module's name."""
    views: Any = field(default_factory=WeakIdKeyDictionary)
    """Tensors that are parameters or buffers moved about, and nothing else."""
    slices: Any = field(default_factory=WeakIdKeyDictionary)
    """The lengths of the slices taken of a tensor so far, by axis."""
    numbers: Any = field(default_factory=WeakIdKeyDictionary)
    """Fields of the channels whose numbers a tensor holds, such as where a maximum was."""
    readers: list[Ids] = field(default_factory=list)
    """Labels of the dimensions along which weights are summed over."""
    stack: list[str] = field(default_factory=list)
    """Names of the modules that are running, outermost first."""
    written: dict[str, set[int]] = field(default_factory=dict)
    """The lengths that occur in each module's attributes."""

    def fields(self, tensor: torch.Tensor) -> Fields:
        """Return the fields of a tensor, none when nothing is known of it."""
        found: Fields | None = self.known.get(tensor)
        if found is None:
            name = self.names.get(id(tensor))
            found = [] if name is None else self._of_state(name, tensor)
            self.known[tensor] = found
        return found

    def _of_state(self, name: str, tensor: torch.Tensor) -> Fields:
        found = []
        for d, size in enumerate(tensor.shape):
            if size > 1:
                self.atoms[name, d] = self.algebra.labels.fresh(size)
                found.append(along(self.atoms[name, d], d, tensor.dim()))
        return found

    def pin_numbers(self, tensors: Iterable[torch.Tensor]) -> None:
        """Pin channels whose numbers are made use of."""
        for tensor in tensors:
            self.algebra.pin(self.numbers.get(tensor, []), NUMBERED)

    def set(self, tensor: torch.Tensor, fields: Fields) -> None:
        """Say in which fields a tensor lies."""
        if any(f.is_meta for f in fields):
            raise RuntimeError("where its channels go depends on values")
        self.known[tensor] = fields

    def is_state(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer, or such a one moved about."""
        return id(tensor) in self.names or tensor in self.views

    def reads(self, weight: torch.Tensor, other: torch.Tensor, axis: int) -> None:
        """Remember that a weight reads the channels of a product's other factor along an axis."""
        if self.is_state(weight) and not self.is_state(other):
            self.readers += [f.numpy().ravel() for f in self.fields(weight) if axes(f) == {axis}]

    def note(self, tensor: torch.Tensor) -> None:
        """Remember the labelled axes of a tensor whose length the running module has written down."""
        if not self.stack or not (lengths := self.written.get(self.stack[-1])):
            return
        fields = self.fields(tensor)
        for d, length in enumerate(tensor.shape):
            if length in lengths and (lines := [f for f in fields if axes(f) == {d}]):
                self.note_size(Size(length, tuple(f.numpy().ravel() for f in lines)))

    def note_size(self, size: Size) -> None:
        """Remember an axis of the running module."""
        known = self.sizes.setdefault(self.stack[-1] if self.stack else "", [])
        if not any(_same_size(size, other) for other in known):
            known.append(size)


def _same_size(one: Size, other: Size) -> bool:
    return (
        one.attribute == other.attribute
        and len(one.labels) == len(other.labels)
        and all(np.array_equal(a, b) for a, b in zip(one.labels, other.labels, strict=True))
    )


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from rarefy.dependencies.operators import movement, rule_of

        in_place = func._schema.name.endswith("_")
        shapes = {id(t): t.shape for t in args if isinstance(t, torch.Tensor)} if in_place else {}
        out = self._run(func, args, kwargs or {})
        call = _call(func, args, kwargs or {}, out, shapes)
        self.trace.pin_numbers(call.tensors)
        rule = rule_of(call)
        try:
            rule(self.trace, call)
        except Exception as error:  # what is not understood is pinned, also where the rule is at fault
            if self.trace.valueless:
                raise
            log.warning("the rule for the operator %r failed: %s: %s", call.name, type(error).__name__, error)
            for tensor in call.tensors:
                self.trace.algebra.pin(self.trace.fields(tensor), f"the rule for the operator {call.name!r} failed")
        if call.name in movement.RULES and call.tensors and all(self.trace.is_state(t) for t in call.tensors):
            for tensor in call.outputs:
                self.trace.views[tensor] = True
        for tensor in (*call.tensors, *call.outputs):
            self.trace.note(tensor)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.trace.valueless and func is _BATCH_NORM and not args[5]:
            # without values torch goes through many operators in Python, which takes half of a run
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: Any, out: Any, shapes: Mapping[int, torch.Size]) -> Call:
    schema = func._schema
    arguments = {}
    for i, argument in enumerate(schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        arguments[argument.name] = args[i] if i < len(args) else kwargs.get(argument.name, default)
    name = schema.name.partition("::")[2]
    return Call(name.rstrip("_") if not name.startswith("__") else name, func, arguments, out, shapes)


class _Functions(TorchFunctionMode):
    """Attention is met as one function, since its operator differs from device to device."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from rarefy.dependencies.operators.attention import attention

        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.utils._python_dispatch._disable_current_modes():
            out = func(*args, **(kwargs or {}))
        attention(self.trace, out, *args, **(kwargs or {}))
        return out


@contextmanager
def tracing(trace: Trace, model: nn.Module) -> Iterator[None]:
    """Carry labels through whatever runs inside, in a form that decomposes into known operators."""
    trace.written = {name: {value for *_, value in written_lengths(m)} for name, m in model.named_modules()}
    names = {module: name for name, module in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in names):
            # the fused recurrent kernel is one opaque operator
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
        for module, name in names.items():
            stack.callback(module.register_forward_pre_hook(_enter(trace, name)).remove)
            stack.callback(module.register_forward_hook(_leave(trace)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Functions(trace))
        stack.enter_context(_Mode(trace))
        yield


def _enter(trace: Trace, name: str) -> Callable[..., None]:
    return lambda module, args: trace.stack.append(name)


def _leave(trace: Trace) -> Callable[..., None]:
    def leave(module: nn.Module, args: Any, out: Any) -> None:
        trace.stack.pop()

    return leave


def written_lengths(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Yield (attribute, place in it when it is a tuple or list, value) for each number that may be an axis's length."""
    ours, known = type(module).__module__.startswith("torch.nn."), follows(module)
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or attribute in known or (ours and attribute not in _WITHOUT_TENSORS):
            continue
        if type(value) is int and value > 1:
            yield attribute, None, value
        elif isinstance(value, list | tuple):
            yield from ((attribute, i, item) for i, item in enumerate(value) if type(item) is int and item > 1)
