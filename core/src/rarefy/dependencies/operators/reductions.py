"""Operators that take something over an axis: sums, means, extremes, softmax, sorting."""

from __future__ import annotations

from collections.abc import Iterable

from rarefy.dependencies.fields import Field, Fields, axes
from rarefy.dependencies.tracing import Call, Rule, Trace

STATISTICS = "statistics"
RATIO = "ratio"
"""A statistic that is another one when every channel is there twice: a sum's share, an unbiased variance, a scale."""
_AVERAGES = frozenset(["mean", "amax", "amin", "aminmax", "max", "min"])
_NUMBERED = "code takes the number of one of its channels"
_ORDERED = "its channels are put in an order or accumulated one after the other"


def _dims(call: Call, ndim: int) -> set[int]:
    given = call.arguments.get("dim")
    if given is None or (isinstance(given, list | tuple) and not given):
        return set(range(ndim))
    return {d % ndim for d in (given if isinstance(given, Iterable) else [given])} if ndim else set()


def _without(trace: Trace, field: Field, gone: set[int]) -> Field:
    """Return a field of size 1 on the axes that are gone, channels that share a place elsewhere united."""
    for d in gone & axes(field):
        field = trace.algebra.collapse(field, d) if axes(field) - gone else field.narrow(d, 0, 1)
    return field


def _reduce(trace: Trace, call: Call, *, zeros_count: bool) -> None:
    source = call.tensors[0]
    gone = _dims(call, source.dim())
    reduced: Fields = []
    biased = call.arguments.get("correction") == 0 or call.arguments.get("unbiased") is False
    for field in trace.fields(source):
        if gone & axes(field):
            if zeros_count:
                trace.algebra.mark([field], STATISTICS)
            if call.name not in _AVERAGES and not biased:
                trace.algebra.mark([field], RATIO)
        if axes(field) - gone:
            reduced.append(_without(trace, field, gone))
    for out in call.outputs[1:]:
        if not out.is_floating_point():
            trace.numbers[out] = [f for f in trace.fields(source) if gone & axes(f)]
    for out in call.outputs:
        kept = reduced
        if out.dim() < source.dim():
            kept = [f.reshape([n for d, n in enumerate(f.shape) if d not in gone]) for f in reduced]
        trace.set(out, kept)


def add(trace: Trace, call: Call) -> None:
    """Sum over an axis: a channel that is zero adds nothing."""
    _reduce(trace, call, zeros_count=False)


def statistic(trace: Trace, call: Call) -> None:
    """Take a mean, an extreme or the like: a channel that is zero counts."""
    _reduce(trace, call, zeros_count=True)


def place(trace: Trace, call: Call) -> None:
    """Pin channels whose numbers are taken, and reduce the others."""
    gone = _dims(call, call.tensors[0].dim())
    trace.algebra.pin([f for f in trace.fields(call.tensors[0]) if gone & axes(f)], _NUMBERED)
    _reduce(trace, call, zeros_count=False)


def softmax(trace: Trace, call: Call) -> None:
    """Normalize over an axis."""
    source = call.tensors[0]
    dims = _dims(call, source.dim())
    for what in (STATISTICS, RATIO):
        trace.algebra.mark([f for f in trace.fields(source) if dims & axes(f)], what)
    trace.set(call.outputs[0], trace.fields(source))


def ordered(trace: Trace, call: Call) -> None:
    """Pin channels whose order or number matters, and keep the others."""
    source = call.tensors[0]
    if source.dim() == 0:
        return
    dims = _dims(call, source.dim()) if call.arguments.get("dim") is not None else {source.dim() - 1}
    fields = trace.fields(source)
    trace.algebra.pin([f for f in fields if dims & axes(f)], _ORDERED)
    kept = [f for f in fields if not dims & axes(f)]
    for out in call.outputs:
        trace.set(out, kept if out.dim() == source.dim() else [])


def extreme(trace: Trace, call: Call) -> None:
    """Treat `max` and `min`, which reduce with one tensor and compare with two."""
    from rarefy.dependencies.operators.pointwise import pointwise

    (pointwise if len(call.tensors) > 1 else statistic)(trace, call)


_STATISTICS = "mean amax amin aminmax prod var std var_mean std_mean logsumexp any all median norm".split()
RULES: dict[str, Rule] = {
    "sum": add,
    "linalg_vector_norm": add,
    **dict.fromkeys(_STATISTICS, statistic),
    "argmax": place,
    "argmin": place,
    "max": extreme,
    "min": extreme,
    "_softmax": softmax,
    "_log_softmax": softmax,
    "_safe_softmax": softmax,
    **dict.fromkeys(
        "cumsum cumprod logcumsumexp sort topk argsort kthvalue _fft_r2c _fft_c2c _fft_c2r".split(), ordered
    ),
}
