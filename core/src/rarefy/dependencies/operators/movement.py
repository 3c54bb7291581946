"""Operators that only move data: the very same operator moves the labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from rarefy.dependencies.fields import Field, Fields, along, axes, compress, moved
from rarefy.dependencies.operators.pointwise import combined
from rarefy.dependencies.tracing import CHOSEN, NUMBERED, UNKNOWN, Call, Rule, Trace

RESHAPED = "a reshape mixes its channels"
FIXED = "code pads or cuts it at a fixed place"


def move(trace: Trace, call: Call) -> None:
    """Apply the operator to the labels."""
    first = next(name for name, value in call.arguments.items() if isinstance(value, torch.Tensor))
    source = call[first]

    def again(field: Field) -> Any:
        arguments = {name: field if name == first else value for name, value in call.arguments.items()}
        arguments.pop("memory_format", None)
        positional = [
            arguments.pop(a.name) for a in call.operator._schema.arguments if not a.kwarg_only and a.name in arguments
        ]
        return call.operator(*positional, **arguments)

    if trace.fields(source):
        _ask_for_values(value for name, value in call.arguments.items() if name != first)
    shape = call.shape(source)
    fields = [field.expand([n or 1 for n in shape]) for field in trace.fields(source)]
    results = [again(field) for field in fields]
    for i, out in enumerate(call.outputs):
        parts = [result[i] if isinstance(result, list | tuple) else result for result in results]
        if 0 not in shape and out.numel() == 0 and out.dim() == len(shape):
            # a part of length zero, such as the rows of an expert that nobody chose, has the other axes' channels
            gone = {d for d, n in enumerate(out.shape) if n == 0}
            parts = [field for field in trace.fields(source) if not axes(field) & gone]
        trace.set(out, [f for part in parts if axes(f := compress(part))])


def _ask_for_values(arguments: Iterable[Any]) -> None:
    """Raise when places are chosen by a tensor without values; torch would read labels from anywhere in memory."""
    if any(isinstance(argument, torch.Tensor) and argument.is_meta for argument in arguments):
        raise RuntimeError("where its channels go depends on values")


def same(trace: Trace, call: Call) -> None:
    """Keep the fields."""
    for out in call.outputs:
        trace.set(out, trace.fields(call.tensors[0]))


def reshape(trace: Trace, call: Call) -> None:
    """Split and merge axes."""
    source, out = call.tensors[0], call.outputs[0]
    if call.operator._schema.name.startswith("aten::view") and source.dtype != out.dtype:
        trace.algebra.pin(trace.fields(source), RESHAPED)
        return
    fields = [
        part for f in trace.fields(source) for part in trace.algebra.reshape(f, source.shape, out.shape, RESHAPED)
    ]
    trace.set(out, fields)


def numbered(argument: str) -> Rule:
    """Return the rule of an operator that picks, shifts or slides along the axes given by `argument`."""

    def rule(trace: Trace, call: Call) -> None:
        ndim = max(call["self"].dim(), 1)
        given = call[argument]
        dims = {d % ndim for d in (given if isinstance(given, list | tuple) else [given])} or set(range(ndim))
        trace.algebra.pin([f for f in trace.fields(call["self"]) if dims & axes(f)], NUMBERED)
        move(trace, call)

    return rule


def triangle(trace: Trace, call: Call) -> None:
    """Pin channels of which a triangle keeps some, unless rows and columns are the same channels."""
    source = call["self"]
    last = source.dim() - 1
    fields = trace.fields(source)
    lines = [[trace.algebra.labels.find(f.numpy().ravel()) for f in fields if axes(f) == {d}] for d in (last - 1, last)]
    rows, columns = lines
    square = len(rows) == len(columns) == 1 and np.array_equal(rows[0], columns[0])
    if not square:
        trace.algebra.pin([f for f in fields if axes(f) & {last - 1, last}], NUMBERED)
    same(trace, call)


def as_real(trace: Trace, call: Call) -> None:
    """Add the axis of real and imaginary parts, which has no channels."""
    trace.set(call.outputs[0], [field.unsqueeze(-1) for field in trace.fields(call["self"])])


def as_complex(trace: Trace, call: Call) -> None:
    """Take the axis of real and imaginary parts away, which go together."""
    fields = trace.fields(call["self"])
    last = call["self"].dim() - 1
    trace.algebra.pin([f for f in fields if axes(f) == {last}], NUMBERED)
    whole = [trace.algebra.collapse(f, last) if last in axes(f) else f for f in fields if axes(f) != {last}]
    trace.set(call.outputs[0], [field.squeeze(-1) for field in whole])


def split(trace: Trace, call: Call) -> None:
    """Tie equal places of equal parts, so that the parts stay equal."""
    source, dim = call["self"], (call["dim"] or 0) % call["self"].dim()
    sizes = [out.shape[dim] for out in call.outputs]
    if len(set(sizes)) > 1 or len(sizes) < 2 or sizes[0] == 1:
        if sizes[0] == 1 and len(sizes) > 1:
            trace.algebra.pin([f for f in trace.fields(source) if dim in axes(f)], NUMBERED)
        move(trace, call)
        return
    parts = _parts(trace, source, dim, len(sizes))
    for out, fields in zip(call.outputs, parts, strict=True):
        trace.set(out, fields)


def cut(trace: Trace, call: Call) -> None:
    """Treat a slice like a part of a split into equal parts where it may be one."""
    source, out = call["self"], call.outputs[0]
    dim = (call["dim"] or 0) % source.dim()
    whole, part, step = source.shape[dim], out.shape[dim], call["step"] or 1
    start = min(max((call["start"] or 0) + (whole if (call["start"] or 0) < 0 else 0), 0), whole)
    labelled = [f for f in trace.fields(source) if dim in axes(f)]
    if part in (0, whole) or not labelled:
        move(trace, call)
        return
    lengths = trace.slices.setdefault(source, {}).setdefault(dim, set())
    lengths.add(part)
    # [:8] and [8:] of 12 are no parts of a split in three, though the second could be the last of three
    if step == 1 and whole % part == 0 and start % part == 0 and part > 1 and len(lengths) == 1:
        trace.set(out, _parts(trace, source, dim, whole // part)[start // part])
    else:
        if step != 1 or part == 1:
            trace.algebra.pin(labelled, NUMBERED)
        move(trace, call)


def _parts(trace: Trace, source: torch.Tensor, dim: int, count: int) -> list[Fields]:
    """Return the fields of each of `count` equal parts of an axis."""
    shape = list(source.shape)
    longer = [*shape[:dim], count, shape[dim] // count, *shape[dim + 1 :]]
    rest: list[Fields] = [[] for _ in range(count)]
    for field in trace.fields(source):
        if dim not in axes(field):
            for fields in rest:
                fields.append(field)
            continue
        for part in trace.algebra.reshape(field, shape, longer, RESHAPED, name=False):
            if dim in axes(part):
                trace.algebra.pin([part], NUMBERED)
            for i, fields in enumerate(rest):
                one = part.narrow(dim, i if part.shape[dim] > 1 else 0, 1).squeeze(dim)
                if axes(one):
                    fields.append(one)
    return rest


def glu(trace: Trace, call: Call) -> None:
    """Tie the two halves, one of which gates the other."""
    source, dim = call["self"], call["dim"] % call["self"].dim()
    first, second = _parts(trace, source, dim, 2)
    shape = call.outputs[0].shape
    trace.set(call.outputs[0], trace.algebra.meet(first, shape, second, shape, UNKNOWN))


def cat(trace: Trace, call: Call) -> None:
    """Put the channels of each operand one behind the other, and unite them across on the other axes."""
    tensors = [t for t in call["tensors"] if t.numel() or t.dim() > 1]
    out = call.outputs[0]
    dim = (call["dim"] or 0) % out.dim()
    across: Fields = []
    shape: list[int] | None = None
    lines: list[Any] = []
    for tensor in tensors:
        fields = trace.fields(tensor)
        other = [f for f in fields if dim not in axes(f)]
        size = [1 if d == dim else n for d, n in enumerate(tensor.shape)]
        across = other if shape is None else trace.algebra.meet(across, shape, other, size, UNKNOWN)
        shape = size
        lines.append([f for f in fields if dim in axes(f)])
    trace.set(out, across + _joined(trace, tensors, lines, dim))


def _joined(trace: Trace, tensors: list[torch.Tensor], lines: list[Fields], dim: int) -> Fields:
    if not any(lines):
        return []
    labels = trace.algebra.labels
    parts = []
    for tensor, fields in zip(tensors, lines, strict=True):
        if not fields:
            ids = labels.fresh(tensor.shape[dim])
            labels.pin(ids, UNKNOWN)
            fields = [along(ids, dim, tensor.dim())]
        field = fields[0] if len(fields) == 1 else torch.from_numpy(labels.joint([f.numpy() for f in fields]))
        parts.append(field.expand([n if d == dim else field.shape[d] for d, n in enumerate(tensor.shape)]))
    wide = [max(part.shape[d] for part in parts) for d in range(parts[0].dim())]
    grown = [part.expand([n if d == dim else wide[d] for d, n in enumerate(part.shape)]) for part in parts]
    return [compress(torch.cat(grown, dim))]


def stack(trace: Trace, call: Call) -> None:
    """Unite the channels of all operands; the new axis has none."""
    out = call.outputs[0]
    dim = call["dim"] % out.dim()
    trace.set(out, [field.unsqueeze(dim) for field in combined(trace, call["tensors"])])


def pad(trace: Trace, call: Call) -> None:
    """Add places that must stay where the padded axis has channels."""
    source, out, amounts = call["self"], call.outputs[0], list(call["pad" if "pad" in call.arguments else "padding"])
    padded = {source.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    fields: Fields = []
    for field in trace.fields(source):
        if not (mine := padded & axes(field)):
            fields.append(field)
            continue
        for d in mine:
            before, after = amounts[2 * (source.dim() - 1 - d) : 2 * (source.dim() - d)]
            ids = trace.algebra.labels.fresh(max(before, 0) + max(after, 0))
            trace.algebra.labels.pin(ids, FIXED)
            shape = [1 if k != d else -1 for k in range(field.dim())]
            ends = torch.from_numpy(ids).reshape(shape)
            if min(before, after) < 0:
                field = field.narrow(d, max(-before, 0), field.shape[d] + min(before, 0) + min(after, 0))
            rest = [1 if k == d else n for k, n in enumerate(field.shape)]
            ends = ends.expand([len(ids) if k == d else n for k, n in enumerate(rest)])
            lead = max(before, 0)
            field = torch.cat([ends.narrow(d, 0, lead), field, ends.narrow(d, lead, len(ids) - lead)], d)
        fields.append(field)
    trace.set(out, fields)


def index(trace: Trace, call: Call) -> None:
    """Pin channels that data or constants choose among; what lies along other axes rides on."""
    source, indices = call["self"], call["indices"]
    chosen: set[int] = set()
    d = 0
    for tensor in indices:
        width = tensor.dim() if tensor is not None and tensor.dtype in (torch.bool, torch.uint8) else 1
        chosen |= set(range(d, d + width)) if tensor is not None else set()
        d += width
    fields = []
    if trace.fields(source):
        _ask_for_values(indices)
    one_each = [i if i is None or call.outputs[0].numel() else _first_of(i) for i in indices]
    for field in trace.fields(source):
        if chosen & axes(field):
            trace.algebra.pin([field], NUMBERED)
        fields.append(moved(field, [n or 1 for n in source.shape], lambda f: torch.ops.aten.index(f, one_each)))
    trace.set(call.outputs[0], [f for f in fields if axes(f)])


def _first_of(index: torch.Tensor) -> torch.Tensor:
    """Return an index that chooses one place where another one chooses none."""
    if index.dtype not in (torch.bool, torch.uint8):
        return index if index.numel() else index.new_zeros([n or 1 for n in index.shape])
    first = index.new_zeros([n or 1 for n in index.shape])
    first.flatten()[0] = 1
    return first


def scatter(trace: Trace, call: Call) -> None:
    """Write or add rows at places that data choose: the other axes of source and target are the same."""
    target = call["self"]
    source = call.arguments.get("source", call.arguments.get("src"))
    dim = call["dim"] % target.dim()
    if source is None:  # a number is written
        trace.algebra.pin([f for f in trace.fields(target) if dim in axes(f)], NUMBERED)
        trace.set(call.outputs[0], trace.fields(target))
        return
    sizes = [[1 if d == dim else n for d, n in enumerate(t.shape)] for t in (target, source)]
    algebra = trace.algebra
    for tensor in (target, source):
        algebra.pin([f for f in trace.fields(tensor) if dim in axes(f)], NUMBERED)
    if sizes[0] != sizes[1]:
        algebra.pin([*trace.fields(target), *trace.fields(source)], NUMBERED)
        return
    ours, theirs = ([f for f in trace.fields(t) if dim not in axes(f)] for t in (target, source))
    trace.set(call.outputs[0], algebra.meet(ours, sizes[0], theirs, sizes[1], UNKNOWN))


def embedding(trace: Trace, call: Call) -> None:
    """Look rows up: which rows there are is fixed, the width is the weight's."""
    weight, indices = call["weight"], call["indices"]
    fields = trace.fields(weight)
    trace.algebra.pin([f for f in fields if 0 in axes(f)], CHOSEN)
    last = indices.dim()
    trace.set(call.outputs[0], [along(f.numpy().ravel(), last, last + 1) for f in fields if 1 in axes(f)])


_MOVES = (
    "permute transpose t unsqueeze squeeze expand repeat repeat_interleave pixel_shuffle pixel_unshuffle "
    "diagonal channel_shuffle native_channel_shuffle broadcast_to numpy_T movedim"
).split()
_SAME = (
    "clone detach alias contiguous lift_fresh lift positive conj _conj "
    "resolve_conj resolve_neg set_ _has_compatible_shallow_copy_type"
).split()
RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES, move),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy"], reshape),
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"], split),
    **dict.fromkeys(["constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d"], pad),
    "select": numbered("dim"),
    "unbind": numbered("dim"),
    "roll": numbered("dims"),
    "flip": move,
    "unfold": numbered("dimension"),
    "tril": triangle,
    "triu": triangle,
    "view_as_real": as_real,
    "view_as_complex": as_complex,
    "slice": cut,
    "narrow": numbered("dim"),
    "glu": glu,
    "cat": cat,
    "stack": stack,
    "index": index,
    "gather": numbered("dim"),
    "index_select": numbered("dim"),
    **dict.fromkeys(["index_add", "index_copy", "scatter_add", "scatter", "scatter_reduce"], scatter),
    "embedding": embedding,
}
