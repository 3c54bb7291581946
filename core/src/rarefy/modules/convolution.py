"""What torch's convolutions compute, for layers whose weight is no parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

_BY_DIMENSIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> torch.Tensor:
    """Return `(n, out, ...)` for `(n, in, ...)`, with the options of `torch.nn.Conv1d`, `Conv2d` or `Conv3d`.

    `weight` is `(out, in / groups, *kernel)` and says in how many dimensions.
    """
    kernel = weight.shape[2:]
    if padding_mode != "zeros":
        x, padding = F.pad(x, _around(kernel, padding, dilation), mode=padding_mode), (0,) * len(kernel)
    run = _BY_DIMENSIONS[len(kernel)]
    return run(x, weight, bias, stride, padding, dilation, groups)


def _around(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """Return the padding as `F.pad` takes it: before and after, the last dimension first."""
    sides = []
    for dim in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[dim] * (kernel[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0, 0] if isinstance(padding, str) else [padding[dim]] * 2
    return sides
