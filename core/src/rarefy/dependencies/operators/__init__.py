"""What each ATen operator says of the labels of its arguments and results."""

from __future__ import annotations

import torch

from rarefy.dependencies.operators import layers, movement, products, reductions
from rarefy.dependencies.operators.pointwise import constant, like, pointwise
from rarefy.dependencies.tracing import Call, Rule, Trace

RULES: dict[str, Rule] = {**movement.RULES, **products.RULES, **reductions.RULES, **layers.RULES}
_POINTWISE = frozenset(
    "copy masked_fill where dropout native_dropout lerp clamp_min clamp_max fill zero relu6 hardtanh "
    "hardswish hardsigmoid prelu _prelu_kernel rrelu_with_noise addcmul addcdiv floor_divide _to_copy "
    "_conj_physical".split()
)
_LIKE = frozenset("zeros_like ones_like full_like empty_like rand_like randn_like bernoulli".split())
_CONSTANT = frozenset("zeros ones full empty new_zeros new_ones new_full new_empty empty_strided".split())
# they give numbers, not activations, or only look at them
_SILENT = frozenset("_local_scalar_dense is_nonzero equal _assert_async _assert_tensor_metadata sym_size".split())


def rule_of(call: Call) -> Rule:
    """Return the rule of an operator; the one for unknown operators pins what it meets."""
    if rule := RULES.get(call.name):
        return rule
    if call.name in _LIKE:
        return like
    if call.name in _CONSTANT:
        return constant
    if call.name in _SILENT:
        return lambda trace, call: None
    if call.name in _POINTWISE or torch.Tag.pointwise in call.operator.tags:
        return pointwise
    return unknown


def unknown(trace: Trace, call: Call) -> None:
    """Pin every channel that meets an operator without a rule."""
    place = f" in {trace.stack[-1]!r}" if trace.stack and trace.stack[-1] else ""
    for tensor in call.tensors:
        trace.algebra.pin(trace.fields(tensor), f"it meets the operator {call.name!r}{place}, which has no rule")
