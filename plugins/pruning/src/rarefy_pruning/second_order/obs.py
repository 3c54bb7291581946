"""Optimal Brain Surgeon layer by layer, each row of a weight being a problem of its own."""

from __future__ import annotations

import torch
from rarefy.hessian import InputHessian, as_rows, inverse
from rarefy.progress import Progress
from torch import nn

from rarefy_pruning.second_order.config import OBSConfig
from rarefy_pruning.second_order.elimination import eliminate
from rarefy_pruning.second_order.layerwise import Layerwise

_WORKSPACE = 2**21
"""Largest number of elements of the inverses that are down-dated at a time."""


class OBS(Layerwise[OBSConfig]):
    """Greedy removal with exact correction; the rows of a layer share what it removes by the increase of its error."""

    dtype = torch.float64

    def solve(self, layer: nn.Module, hessian: InputHessian, zeros: int) -> torch.Tensor:
        """Return the rows after the removals that cost least."""
        inverses = inverse(hessian.damped(self.config.damping), repr(hessian.name))
        rows = as_rows(layer).to(inverses)
        order, losses = self._whole_way(rows, inverses, hessian.name)
        problems = zip(rows.flatten(0, 1), order, cheapest(losses, zeros), strict=True)
        per_group = rows.shape[1]
        solved = [
            remove(row, inverses[place // per_group], first[:count])
            for place, (row, first, count) in enumerate(problems)
        ]
        return torch.stack(solved).view_as(rows)

    def _whole_way(self, rows: torch.Tensor, inverses: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return in which order and at what cost each row loses all its weights, both `(all rows, inputs)`."""
        flat, inputs = rows.flatten(0, 1), rows.shape[2]
        group = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        at_once = max(1, _WORKSPACE // inputs**2)
        parts = []
        with Progress(f"removing weights of {name}", flat.numel()) as progress:
            for weights, groups in zip(flat.split(at_once), group.split(at_once), strict=True):
                parts.append(eliminate(weights, inverses[groups], inputs, progress=progress))
        return torch.cat([part.order for part in parts]), torch.cat([part.losses for part in parts])


def cheapest(losses: torch.Tensor, count: int) -> torch.Tensor:
    """Return how far to follow each row so that `count` removals of all rows cost least, `(rows,)`.

    `losses` is `(rows, steps)`. The next removal is always made in the row where it costs least; a cheap one behind a
    dear one has to wait for it (Frantar et al. 2022, section 4).
    """
    in_turn = losses.cummax(1).values.flatten().argsort(stable=True)[:count]
    return torch.bincount(in_turn // losses.shape[1], minlength=len(losses))


def remove(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Return `weight`, `(n,)`, without those at `gone`, the others corrected for all of them together.

    It is what removing them one by one comes to, without the rounding of the steps: the nearest weights in the sense of
    1/2 d H d^T among those that are zero at `gone` (Hassibi & Stork 1992, eq. 5, for several weights).
    """
    if len(gone) == 0:
        return weight
    columns = inverse[:, gone]
    corrected = weight - columns @ torch.linalg.solve(columns[gone], weight[gone])
    corrected[gone] = 0
    return corrected
