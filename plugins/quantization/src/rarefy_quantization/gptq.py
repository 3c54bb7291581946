"""Rounding input by input, each error made up for by the inputs that come after it (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from rarefy.hessian import InputHessian, as_rows, inverse_factor
from torch import nn

from rarefy_quantization.config import GPTQConfig
from rarefy_quantization.grids import Grid
from rarefy_quantization.layerwise import LayerwiseQuantizer
from rarefy_quantization.ranges import fit_grid

Fit = Callable[[torch.Tensor], Grid]
"""Is given weights `(groups, rows, inputs)` and returns their grid, `(groups, rows, 1)` or what expands to it."""


class GPTQ(LayerwiseQuantizer[GPTQConfig]):
    """Rounds one layer after the other so that its outputs stay the nearest."""

    def solve(self, layer: nn.Module, hessian: InputHessian, bits: int) -> tuple[torch.Tensor, Grid]:
        """Return the rows of the layer as they were when they were rounded, and the grid they were rounded to."""
        rows, units = as_rows(layer).to(hessian.value), self.units(layer.weight)
        damped = hessian.damped(self.config.damping)
        order = torch.arange(rows.shape[-1], device=rows.device)
        if self.config.order == "activation":
            order = damped.diagonal(dim1=-2, dim2=-1).mean(0).argsort(descending=True, stable=True)
        factor = inverse_factor(damped[:, order][:, :, order], repr(hessian.name))
        width = min(units.size, rows.shape[-1])
        parts = [(order // width == part).nonzero().flatten() for part in range(-(-rows.shape[-1] // width))]
        swept, grids = sweep(rows[..., order], factor, self._fit(bits), parts, self.config.block)
        return torch.empty_like(rows).index_copy_(2, order, swept), self._whole(grids)

    def _fit(self, bits: int) -> Fit:
        def fit(weight: torch.Tensor) -> Grid:
            pooled = self.config.granularity == "tensor"
            grid = fit_grid(weight.reshape(1, -1) if pooled else weight.flatten(0, 1), bits, self.config)
            shape = (1, 1, 1) if pooled else (*weight.shape[:2], 1)
            return Grid(grid.step.view(shape), grid.low.view(shape), grid.high.view(shape))

        return fit

    def _whole(self, grids: Sequence[Grid]) -> Grid:
        """Return the grids of the parts of all rows as one, in the order of the units."""
        together = ([getattr(grid, name) for grid in grids] for name in ("step", "low", "high"))
        return Grid(*(torch.cat(values, -1).view(-1, 1) for values in together))


def sweep(
    weight: torch.Tensor, factor: torch.Tensor, fit: Fit, parts: Sequence[torch.Tensor], block: int
) -> tuple[torch.Tensor, list[Grid]]:
    """Return `weight`, `(groups, rows, inputs)`, as each input is when its turn to be rounded comes, and the grids.

    `factor` is the upper U with H^-1 = U^T U, `(groups, inputs, inputs)`. An error e at input j, what is to be rounded
    less what it is rounded to, changes the weights after it by -(e / U_jj) U_j (Frantar et al. 2023, eq. 2 and section
    4, step 3). `parts` are the inputs that share a grid; it is fitted to them as they are when the first is reached.
    Weights that are zero stay zero, and what would have been added to them goes to the inputs after them.
    """
    result, errors, zero = weight.clone(), torch.zeros_like(weight), weight == 0
    grids: list[Grid | None] = [None] * len(parts)
    part_of = {int(j): number for number, part in enumerate(parts) for j in part}
    inputs = weight.shape[-1]
    for start, end in pairwise([*range(0, inputs, block), inputs]):
        current = result[..., start:end]
        current -= errors[..., :start] @ factor[:, :start, start:end]
        for j in range(start, end):
            number = part_of[j]
            grid = grids[number]
            if grid is None:
                part = parts[number]
                now = weight[..., part] - errors[..., :j] @ factor[:, :j, part]
                grid = grids[number] = fit(now.masked_fill(zero[..., part], 0))
            column = current[..., j - start, None]
            snapped = grid.snap(column).masked_fill(zero[..., j, None], 0)
            errors[..., j] = ((column - snapped) / factor[:, j, j, None, None]).squeeze(-1)
            current[..., j - start + 1 :] -= errors[..., j, None] * factor[:, j, None, j + 1 : end]
    return result.masked_fill_(zero, 0), [grid for grid in grids if grid is not None]
