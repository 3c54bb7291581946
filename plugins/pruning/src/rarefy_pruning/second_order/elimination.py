"""Removing weights one by one with exact correction of the others (Hassibi & Stork 1992)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rarefy.progress import Progress


@dataclass(frozen=True)
class Elimination:
    """What became of rows of weights."""

    weight: torch.Tensor
    """`(rows, n)`; removed weights are exactly zero."""
    order: torch.Tensor
    """Positions of the removed weights, first to last, `(rows, steps)`."""
    losses: torch.Tensor
    """Increase of the error by each removal, `(rows, steps)`."""


def eliminate(
    weight: torch.Tensor,
    inverse: torch.Tensor,
    steps: int,
    fixed: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Elimination:
    """Remove `steps` weights of each row, always the one that raises the error 1/2 d H d^T the least.

    `weight` is `(rows, n)`, `inverse` is each row's H^-1, `(rows, n, n)`, and is overwritten; weights that are `fixed`,
    a mask `(n,)`, are corrected and never removed. Hassibi & Stork 1992, eq. 5: weight q costs L_q = w_q^2 /
    (2 [H^-1]_qq), and the others change by -w_q / [H^-1]_qq H^-1 e_q. What is removed then leaves the problem: the
    inverse of H without row and column q is H^-1 - H^-1 e_q e_q^T H^-1 / [H^-1]_qq, so it stays zero.
    """
    rows, n = weight.shape
    places = torch.arange(n, device=weight.device).expand(rows, n)
    held = torch.zeros_like(weight, dtype=torch.bool) if fixed is None else fixed.expand(rows, n)
    left, orders, losses = weight.clone(), [], []
    while steps > 0:
        # what was removed leaves the matrices now and then, so that all steps together cost 0.4 n^3, not n^3
        some = min(steps, 1 + places.shape[1] // 4)
        order, loss, gone = _remove_(left, inverse, held, some, progress)
        orders.append(places.gather(1, order))
        losses.append(loss)
        stay = (~gone).nonzero()[:, 1].view(rows, -1)
        left, places, held = (tensor.gather(1, stay) for tensor in (left, places, held))
        inverse = inverse[torch.arange(rows, device=stay.device)[:, None, None], stay[:, :, None], stay[:, None, :]]
        steps -= some
    result = torch.zeros_like(weight).scatter_(1, places, left)
    return Elimination(result, torch.cat([places[:, :0], *orders], 1), torch.cat([left[:, :0], *losses], 1))


def _remove_(
    weight: torch.Tensor, inverse: torch.Tensor, held: torch.Tensor, steps: int, progress: Progress | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correct `weight` and down-date `inverse` in place; return the order, the costs and the mask of the removed."""
    rows = torch.arange(len(weight), device=weight.device)
    gone = torch.zeros_like(held)
    order, losses = [], []
    for _ in range(steps):
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)
        cost = (weight.square() / (2 * diagonal)).masked_fill(gone | held, torch.inf)
        loss, q = cost.min(1)
        order.append(q)
        losses.append(loss)
        column = inverse[rows, q].masked_fill(gone, 0)
        scaled = column / column[rows, q].unsqueeze(1)
        weight -= weight[rows, q].unsqueeze(1) * scaled
        inverse.addcmul_(scaled.unsqueeze(2), column.unsqueeze(1), value=-1)
        gone[rows, q] = True
        if progress is not None:
            progress.advance(len(weight))
    return torch.stack(order, 1), torch.stack(losses, 1), gone
