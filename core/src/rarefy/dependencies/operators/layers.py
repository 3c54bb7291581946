"""Convolutions, normalizations, pooling and resampling."""

from __future__ import annotations

import torch

from rarefy.dependencies.fields import Fields, along, axes
from rarefy.dependencies.operators.movement import RESHAPED
from rarefy.dependencies.operators.pointwise import combined
from rarefy.dependencies.operators.reductions import STATISTICS
from rarefy.dependencies.tracing import UNKNOWN, Call, Rule, Size, Trace

KERNEL = "kernel"
_UNEVEN = "convolution groups split its channels unevenly"


def convolution(trace: Trace, call: Call) -> None:
    """Unite input channels with the weight's; in groups, whole groups and equal places in all groups."""
    x, weight, bias, groups, out = call["input"], call["weight"], call["bias"], call["groups"], call.outputs[0]
    algebra = trace.algebra
    algebra.mark([f for f in trace.fields(weight) if min(axes(f)) > 1], KERNEL)
    trace.reads(weight, x, 0 if call["transposed"] else 1)
    first, second = ([f for f in trace.fields(weight) if axes(f) == {d}] for d in (0, 1))
    # fields of (groups, channels per group); a transposed convolution has its input channels first
    rows = _in_groups(trace, first, weight.shape[0], groups)
    whole, places = [f for f in rows if axes(f) == {0}], [f for f in rows if axes(f) == {1}]
    inner = [f.reshape(1, -1) for f in second]
    taken, given = (places, inner) if call["transposed"] else (inner, places)
    shape = [groups, x.shape[1] // groups]
    algebra.meet(_in_groups(trace, _channels(trace, x, 1), x.shape[1], groups), shape, whole + taken, shape, UNKNOWN)
    if groups > 1:
        trace.note_size(Size(groups, tuple(f.numpy().ravel() for f in whole), "groups"))
    channels, per_group = out.shape[1], out.shape[1] // groups
    lines = [part for f in whole + given for part in algebra.reshape(f, [groups, per_group], [channels], RESHAPED)]
    if bias is not None:
        lines = algebra.meet(lines, [channels], trace.fields(bias), [channels], UNKNOWN)
    samples = [f.reshape([-1] + [1] * (out.dim() - 1)) for f in trace.fields(x) if axes(f) == {0}]
    trace.set(out, [along(f.numpy().ravel(), 1, out.dim()) for f in lines] + samples)


def _channels(trace: Trace, x: torch.Tensor, axis: int) -> Fields:
    """Return the fields along the channel axis only; what shares a channel is united, other axes are pinned."""
    found = []
    for field in trace.fields(x):
        if axis not in axes(field):
            if axes(field) - {0}:
                trace.algebra.pin([field], "a convolution or pooling slides along it")
            continue
        for d in axes(field) - {axis}:
            field = trace.algebra.collapse(field, d)
        found.append(field.reshape(-1))
    return found


def _in_groups(trace: Trace, fields: Fields, length: int, groups: int) -> Fields:
    """Return fields of a line of channels as fields of (groups, channels per group)."""
    parts = []
    for field in fields:
        parts += trace.algebra.reshape(field.reshape(-1), [length], [groups, length // groups], _UNEVEN)
    return parts


def sliding(trace: Trace, call: Call) -> None:
    """Treat pooling and resampling, which leave channels as they are."""
    source = call.tensors[0]
    spatial = {"1d": 1, "3d": 3}.get(next((k for k in ("1d", "3d") if k in call.name), ""), 2)
    inner = set(range(source.dim() - spatial, source.dim()))
    kept = []
    for field in trace.fields(source):
        if axes(field) <= inner:
            trace.algebra.pin([field], "a convolution or pooling slides along it")
            continue
        for d in inner & axes(field):
            field = trace.algebra.collapse(field, d)
        kept.append(field)
    for out in call.outputs:
        trace.set(out, kept if out.dim() == source.dim() else [])


def batch_norm(trace: Trace, call: Call) -> None:
    """Unite a channel with its scale, shift, mean and variance."""
    x, out = call.tensors[0], call.outputs[0]
    fields = trace.fields(x)
    shape = list(x.shape)
    for vector in call.tensors[1:]:
        sizes = [vector.shape[0] if d == 1 else 1 for d in range(x.dim())]
        line = [along(f.numpy().ravel(), 1, x.dim()) for f in trace.fields(vector)]
        fields = trace.algebra.meet(fields, shape, line, sizes, UNKNOWN)
    trace.set(out, fields)


def layer_norm(trace: Trace, call: Call) -> None:
    """Normalize over the last axes."""
    x = call["input"]
    last = set(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    trace.algebra.mark([f for f in trace.fields(x) if last & axes(f)], STATISTICS)
    trace.set(call.outputs[0], combined(trace, call.tensors))


def group_norm(trace: Trace, call: Call) -> None:
    """Normalize within groups of channels: whole groups can go without a change of the others' statistics."""
    x, groups, out = call["input"], call["group"], call.outputs[0]
    algebra, channels = trace.algebra, x.shape[1]
    longer = [x.shape[0], groups, channels // groups, *x.shape[2:]]
    fields = []
    for field in trace.fields(x):
        parts = algebra.reshape(field, x.shape, longer, "normalization groups split its channels unevenly")
        algebra.mark([f for f in parts if axes(f) - {0, 1}], STATISTICS)
        heads = [f for f in parts if axes(f) == {1}]
        if heads and groups > 1:
            trace.note_size(Size(groups, tuple(f.numpy().ravel() for f in heads), "num_groups"))
        fields += [part for f in parts for part in algebra.reshape(f, longer, x.shape, RESHAPED)]
    for vector in (call["weight"], call["bias"]):
        if vector is not None:
            line = [along(f.numpy().ravel(), 1, x.dim()) for f in trace.fields(vector)]
            sizes = [channels if d == 1 else 1 for d in range(x.dim())]
            fields = algebra.meet(fields, x.shape, line, sizes, UNKNOWN)
    trace.set(out, fields)


def weight_norm(trace: Trace, call: Call) -> None:
    """Scale the rows of a weight to given norms."""
    trace.set(call.outputs[0], combined(trace, [call["v"], call["g"]]))


def im2col(trace: Trace, call: Call) -> None:
    """Lay patches out: each channel becomes as many rows as a patch has places."""
    x, out = call["self"], call.outputs[0]
    times = out.shape[1] // x.shape[1]
    trace.set(out, [along(f.repeat_interleave(times).numpy(), 1, 3) for f in _channels(trace, x, 1)])


_SLIDING = (
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d avg_pool1d max_pool1d adaptive_avg_pool1d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d reflection_pad3d replication_pad1d replication_pad3d"
).split()
_BATCH_NORMS = (
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm _batch_norm_impl_index"
).split()
RULES: dict[str, Rule] = {
    "convolution": convolution,
    "_convolution": convolution,
    **dict.fromkeys(_SLIDING, sliding),
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    "_weight_norm": weight_norm,
    "im2col": im2col,
}
