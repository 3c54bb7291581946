"""Scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch

from rarefy.dependencies.fields import Fields, axes, compress
from rarefy.dependencies.operators.reductions import RATIO, STATISTICS
from rarefy.dependencies.tracing import UNKNOWN, Trace


def attention(
    trace: Trace,
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **rest: Any,
) -> None:
    """Unite heads, and the places within the heads of queries and keys; values ride through.

    Tensors are (..., heads, tokens, width of a head); with grouped queries, keys and values have fewer heads.
    """
    algebra, ndim = trace.algebra, query.dim()
    last, tokens = ndim - 1, ndim - 2
    q, k, v = (trace.fields(t) for t in (query, key, value))
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        k, v = ([_repeated(f, ndim - 3, times) for f in fields] for fields in (k, v))
    algebra.contract(q, last, k, last, UNKNOWN)
    if scale is None:
        # the default scale is one over the root of the width
        for what in (STATISTICS, RATIO):
            algebra.mark([f for f in (*q, *k) if last in axes(f)], what)
    for fields in (q, k, v):
        algebra.pin([f for f in fields if tokens in axes(f)], UNKNOWN)
    heads = [1 if d in (last, tokens) else n for d, n in enumerate(query.shape)]
    found = algebra.meet(_outer(q, tokens), heads, _outer(k, tokens), heads, UNKNOWN)
    found = algebra.meet(found, heads, _outer(v, tokens), heads, UNKNOWN)
    if attn_mask is not None:
        mask = trace.fields(attn_mask)
        lead = attn_mask.dim() - 2
        algebra.pin([f for f in mask if axes(f) & {lead, lead + 1}], UNKNOWN)
        shape = [*attn_mask.shape[:lead], 1, 1]
        found = algebra.meet(found, heads, [f for f in mask if not axes(f) & {lead, lead + 1}], shape, UNKNOWN)
    trace.set(out, found + [f for f in v if axes(f) == {last}])


def _outer(fields: Fields, tokens: int) -> Fields:
    return [field for field in fields if axes(field) and max(axes(field)) < tokens]


def _repeated(field: torch.Tensor, axis: int, times: int) -> torch.Tensor:
    if field.shape[axis] == 1:
        return field
    return compress(field.repeat_interleave(times, axis))
