"""Codes and codebooks that change the responses of a layer the least.

With target rows t and quantized rows q, the error is the sum over rows of 1/2 (t - q) H (t - q)^T (see
`rarefy.hessian`). It is quadratic in the vectors of the codebooks and, all else fixed, in the one vector that a code
chooses; so codes are found one place after the other, and the codebooks of all places together. Neither raises it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from rarefy.hessian import InputHessian

_STEPS = 20
"""Most steps of conjugate gradients for the codebooks of a layer."""
_ENOUGH = 1e-12
"""Share of the squared residual at which they stop."""


class Responses:
    """The codes, (groups, rows, places), and the codebooks, (vectors, length), of one layer."""

    def __init__(
        self, target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, edges: list[int]
    ) -> None:
        """Begin with the given codes.

        `target` is (groups, rows, columns), `hessian` (groups, columns, columns), positive definite; `edges` are the
        places at which the blocks begin, and where the last ends. The vectors of a block stand together in the
        codebook, in the order of the blocks.
        """
        self.target, self.hessian, self.codes, self.codebook = target, hessian, codes, codebook
        self.length = codebook.shape[1]
        self.blocks = [_vectors_of(codes[..., first:last]) for first, last in pairwise(edges)]
        self.block_of = [block for block, (first, last) in enumerate(pairwise(edges)) for _ in range(first, last)]

    def rows(self) -> torch.Tensor:
        """Return the quantized rows, (groups, rows, columns)."""
        return self._spread(self.codebook)

    def error(self) -> float:
        """Return the error."""
        change = self.target - self.rows()
        return 0.5 * float((change @ self.hessian * change).sum())

    def fit(self, rounds: int) -> list[float]:
        """Alternate until no code changes, at most `rounds` times; return the error before and after each round."""
        errors = [self.error()]
        for _ in range(rounds):
            before = self.codes.clone()
            self.assign_()
            self.update_()
            errors.append(self.error())
            if torch.equal(before, self.codes):
                break
        return errors

    def assign_(self) -> None:
        """Give each place, one after the other, the vector of its block that makes the error least."""
        change = self.target - self.rows()
        for place, block in enumerate(self.block_of):
            columns, vectors = self._columns(place), slice(*self.blocks[block])
            metric, candidates = self._metric(place), self.codebook[vectors]
            now = self.codebook[self.codes[..., place]]
            # with c in the place of `now` the error is 1/2 c M c^T - c (M now^T + H change^T) and what c does not touch
            pull = change @ self.hessian[..., columns] + now @ metric
            own = 0.5 * (candidates @ metric * candidates).sum(-1)
            codes = (own.unsqueeze(1) - pull @ candidates.T).argmin(-1) + vectors.start
            change[..., columns] += now - self.codebook[codes]
            self.codes[..., place] = codes

    def update_(self) -> None:
        """Move all vectors of the codebooks towards the least error, by conjugate gradients.

        The preconditioner, the metric of the places that use a vector, is the whole of it where places do not interact.
        """
        factor = torch.linalg.cholesky(self._metrics())
        residual = self._gathered((self.target - self.rows()) @ self.hessian)
        step = direction = torch.cholesky_solve(residual.unsqueeze(2), factor).squeeze(2)
        product = first = (residual * step).sum()
        for _ in range(_STEPS):
            if product <= _ENOUGH * first or product == 0:
                break
            image = self._gathered(self._spread(direction) @ self.hessian)
            scale = product / (direction * image).sum()
            self.codebook = self.codebook + scale * direction
            residual = residual - scale * image
            step = torch.cholesky_solve(residual.unsqueeze(2), factor).squeeze(2)
            before, product = product, (residual * step).sum()
            direction = step + product / before * direction

    def _columns(self, place: int) -> slice:
        return slice(place * self.length, (place + 1) * self.length)

    def _metric(self, place: int) -> torch.Tensor:
        """Return the block of H at a place, (groups, length, length)."""
        columns = self._columns(place)
        return self.hessian[:, columns, columns]

    def _spread(self, codebook: torch.Tensor) -> torch.Tensor:
        """Return the rows that the codes make of a codebook."""
        return codebook[self.codes].flatten(2)

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """Return for each vector the sum over the places that use it: the transpose of `_spread`."""
        flat = rows.reshape(-1, self.length)
        return torch.zeros_like(self.codebook).index_add_(0, self.codes.flatten(), flat)

    def _metrics(self) -> torch.Tensor:
        """Return the sum of the metrics of the places that use each vector; the identity for one that none uses."""
        count, length = self.codebook.shape
        sums = self.codebook.new_zeros(count, length, length)
        for place in range(self.codes.shape[-1]):
            codes = self.codes[..., place]
            metric = self._metric(place).unsqueeze(1).expand(*codes.shape, length, length)
            sums.index_add_(0, codes.flatten(), metric.reshape(-1, length, length))
        unused = torch.bincount(self.codes.flatten(), minlength=count) == 0
        return torch.where(unused[:, None, None], torch.eye(length, dtype=sums.dtype, device=sums.device), sums)


def refitted(rows: torch.Tensor, hessian: InputHessian, damping: float) -> torch.Tensor:
    """Return the rows that give, on the inputs x' of `hessian`, most nearly what `rows` give on those they should have.

    With W the rows, R the damping and K = 2/N sum x x'^T the `cross` of the Hessian H, they are the V of least
    |W x - V x'|^2 + |V - W|_R^2: V = W (K + R) (H + R)^-1.
    """
    damped = hessian.damped(damping)
    wanted = rows @ (hessian.cross + damped - hessian.value)
    return torch.cholesky_solve(wanted.mT, torch.linalg.cholesky(damped)).mT


def _vectors_of(codes: torch.Tensor) -> tuple[int, int]:
    """Return the range of a block's vectors in the codebook; k-means leaves none without a user."""
    return int(codes.min()), int(codes.max()) + 1
