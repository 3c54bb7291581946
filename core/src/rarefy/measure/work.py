"""How many floating-point operations a forward pass takes, counted without computing."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rarefy.errors import StageError
from rarefy.measure.mode import device_of, move


def flops(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Count the FLOPs (2 x MACs) of convolutions, matrix products, attention and FFTs in one forward pass.

    A zero weight counts like any other: no dense kernel leaves it out. Element-wise work is not counted.
    Raises `StageError` for a model on the meta device that cannot run there.
    """
    return _counted(model, inputs).get_total_flops()


def flops_by_module(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Return the FLOPs of each module by name, those of its children included; the model itself is `""`."""
    counts = _counted(model, inputs).get_flop_counts()
    del counts["Global"]
    root = type(model).__name__
    return {name.removeprefix(root).removeprefix("."): sum(work.values()) for name, work in counts.items()}


def _counted(model: nn.Module, inputs: tuple[Any, ...]) -> FlopCounterMode:
    try:
        return _count(_on_meta(model), move(inputs, "meta"))
    except Exception as error:
        if device_of(model).type == "meta":
            raise StageError(
                f"the FLOPs of {type(model).__name__} cannot be counted without values: {error}. "
                "A real run can count them; leave out --dry-run"
            ) from error
    return _count_on_cpu(copy.deepcopy(model).cpu(), move(inputs, "cpu"))


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy without values; the tensors are swapped while copying, so a large model needs no second one."""
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(model, memo)


def _count(model: nn.Module, inputs: tuple[Any, ...]) -> FlopCounterMode:
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_FFT)
    with torch.no_grad(), counter:
        model(*inputs)
    return counter


def _count_on_cpu(model: nn.Module, inputs: tuple[Any, ...]) -> FlopCounterMode:
    # the fused kernels of the CPU for attention and LSTM are unknown to torch's counter and would count nothing
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            with torch.backends.mkldnn.flags(enabled=False):
                return _count(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _complex_fft(shape: Sequence[int], dims: Sequence[int], *_: Any, **__: Any) -> int:
    """Return 5 N log2 N per transform of N points, the convention of FFTW's benchmarks."""
    points = math.prod(shape[dim] for dim in dims)
    return round(5 * math.prod(shape) * math.log2(points)) if points > 1 else 0


def _real_fft(shape: Sequence[int], dims: Sequence[int], *rest: Any, **named: Any) -> int:
    return _complex_fft(shape, dims) // 2


def _inverse_real_fft(shape: Sequence[int], dims: Sequence[int], *rest: Any, out_shape: Any, **named: Any) -> int:
    return _complex_fft(out_shape, dims) // 2


_FFT = {
    torch.ops.aten._fft_c2c: _complex_fft,
    torch.ops.aten._fft_r2c: _real_fft,
    torch.ops.aten._fft_c2r: _inverse_real_fft,
}
