"""Matrix products: the channels that are summed over go together, the others are the result's."""

from __future__ import annotations

import torch

from rarefy.dependencies.fields import Fields, axes
from rarefy.dependencies.operators.reductions import RATIO
from rarefy.dependencies.tracing import CHOSEN, UNKNOWN, Call, Rule, Trace


def _multiply(trace: Trace, one: torch.Tensor, other: torch.Tensor) -> Fields:
    """Return the fields of `(..., i, k) @ (..., k, j)`, both with the same number of leading axes."""
    algebra, ndim = trace.algebra, one.dim()
    left, right = trace.fields(one), trace.fields(other)
    trace.reads(one, other, ndim - 1)
    trace.reads(other, one, ndim - 2)
    if not trace.is_state(one) and not trace.is_state(other):
        algebra.mark([f for f in left if ndim - 1 in axes(f)], RATIO)
    algebra.contract(left, ndim - 1, right, ndim - 2, UNKNOWN)
    rows = [f for f in left if ndim - 1 not in axes(f)]
    columns = [f for f in right if ndim - 2 not in axes(f)]
    return algebra.meet(rows, [*one.shape[:-1], 1], columns, [*other.shape[:-2], 1, other.shape[-1]], UNKNOWN)


def product(trace: Trace, call: Call) -> None:
    """Treat `mm` and `bmm`."""
    one, other = call.tensors[:2]
    trace.set(call.outputs[0], _multiply(trace, one, other))


def sum_and_product(trace: Trace, call: Call) -> None:
    """Treat `addmm` and `baddbmm`."""
    added, one, other = call.tensors[:3]
    out = call.outputs[0]
    trace.set(
        out, trace.algebra.meet(trace.fields(added), added.shape, _multiply(trace, one, other), out.shape, UNKNOWN)
    )


def vector(trace: Trace, call: Call) -> None:
    """Treat `mv`, `addmv` and `dot`."""
    one, other = call.tensors[-2:]
    algebra = trace.algebra
    trace.reads(one, other, one.dim() - 1)
    trace.reads(other, one, 0)
    algebra.contract(trace.fields(one), one.dim() - 1, trace.fields(other), 0, UNKNOWN)
    fields = [f.squeeze(-1) for f in trace.fields(one) if one.dim() > 1 and one.dim() - 1 not in axes(f)]
    out = call.outputs[0]
    if len(call.tensors) > 2:
        added = call.tensors[0]
        fields = algebra.meet(trace.fields(added), added.shape, fields, out.shape, UNKNOWN)
    trace.set(out, fields)


def grouped(trace: Trace, call: Call) -> None:
    """Treat `_grouped_mm` of `(rows, k)` by `(experts, k, j)`, where data choose the expert of each row."""
    rows, experts, out = call["self"], call["mat2"], call.outputs[0]
    algebra = trace.algebra
    fields = trace.fields(experts)
    if rows.dim() != 2 or experts.dim() != 3:
        for tensor in (rows, experts):
            algebra.pin(trace.fields(tensor), "matrices of several sizes are multiplied in groups")
        return
    trace.reads(experts, rows, 1)
    algebra.pin([f for f in fields if 0 in axes(f)], CHOSEN)
    algebra.contract(trace.fields(rows), 1, fields, 1, UNKNOWN)
    found = [f for f in trace.fields(rows) if axes(f) == {0}]
    trace.set(out, found + [f.reshape(1, -1) for f in fields if axes(f) == {2}])


RULES: dict[str, Rule] = {
    "mm": product,
    "bmm": product,
    "addmm": sum_and_product,
    "_addmm_activation": sum_and_product,
    "baddbmm": sum_and_product,
    "mv": vector,
    "dot": vector,
    "addmv": vector,
    "_grouped_mm": grouped,
}
