"""What all factorizations of a layer have in common: the choice of the rank and the question whether it pays."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rarefy.task import Task
from rarefy.technique import Analysis, LayerTechnique, Plan, Skip, replace_, select
from torch import nn

from rarefy_factorization.config import RankConfig
from rarefy_factorization.schemes import Scheme
from rarefy_factorization.surroundings import leave_fast_path_, tied_weights

ConfigT = TypeVar("ConfigT", bound=RankConfig)


@dataclass(frozen=True)
class Factors:
    """The factors of a layer, one pair per group."""

    left: torch.Tensor
    """`(groups, rows, rank)`."""
    right: torch.Tensor
    """`(groups, rank, columns)`."""


class Factorizer(LayerTechnique[ConfigT]):
    """Replaces each target layer by two; write `scheme` and `factors`."""

    tied: frozenset[nn.Parameter] = frozenset()
    """Weights of the analyzed model that several modules use."""

    def scheme(self, layer: nn.Module) -> Scheme:
        """Return in which way the layer's weight is a matrix."""
        raise NotImplementedError

    def spectrum(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the singular values of `(groups, rows, columns)`, descending, `(groups, full rank)`."""
        raise NotImplementedError

    def factors(self, matrix: torch.Tensor, rank: int) -> Factors:
        """Return factors of a rank that approximate `(groups, rows, columns)`."""
        raise NotImplementedError

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        """Choose the rank and factorize, where that makes the layer smaller and lighter."""
        if layer.weight in self.tied:
            return Skip("another module uses the same weight and would keep it, so nothing would be saved")
        scheme: Any = self.scheme(layer)
        matrix = scheme.unfold(layer).detach()
        if not matrix.any():
            return Skip("all its weights are zero")
        full = min(matrix.shape[1:])
        spectrum = self.spectrum(matrix) if self.config.energy is not None else None
        rank = self.rank(matrix.shape, spectrum)
        reason = _why_not(scheme, layer, matrix.shape, rank)
        if reason is not None:
            return Skip(reason)
        found = self.factors(matrix, rank)
        found = Factors(found.left.to(matrix.dtype), found.right.to(matrix.dtype))
        product = found.left.double() @ found.right.double()
        error = torch.linalg.norm(product - matrix.double()) / torch.linalg.norm(matrix.double()).clamp(min=1e-300)
        before, after = matrix.numel(), found.left.numel() + found.right.numel()
        scores = {
            "rank": rank,
            "full_rank": full,
            "relative_error": float(error),
            "parameters_before": before,
            "parameters_after": after,
        }
        return Plan(f"rank {rank} of {full}", scores, found)

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        """Return the two layers."""
        scheme: Any = self.scheme(layer)
        built: nn.Module = scheme.build(layer, plan.detail.left, plan.detail.right)
        return built

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Plan every target layer, but none whose weight is tied to another's."""
        self.tied = tied_weights(model)
        return super().analyze(model, task)

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Apply the plans."""
        return leave_fast_path_(super().transform(model, analysis, task))

    def predict(self, model: nn.Module) -> nn.Module:
        """Return the model with the layers replaced, where the rank does not depend on the weights."""
        if self.config.energy is not None:
            return model
        model = copy.deepcopy(model)
        tied = tied_weights(model)
        for _, layer in list(select(model, self.config)):
            if layer.weight in tied:
                continue
            scheme: Any = self.scheme(layer)
            groups, rows, columns = scheme.unfold(layer).shape
            rank = self.rank((groups, rows, columns), None)
            if _why_not(scheme, layer, (groups, rows, columns), rank) is None:
                weight = layer.get_parameter("weight")
                left, right = weight.new_empty(groups, rows, rank), weight.new_empty(groups, rank, columns)
                replace_(model, layer, scheme.build(layer, left, right))
        return leave_fast_path_(model)

    def rank(self, shape: tuple[int, ...], spectrum: torch.Tensor | None) -> int:
        """Return the rank that the options ask for, from 1 to the full one; 0 when not even 1 fits."""
        _, rows, columns = shape
        full, config = min(rows, columns), self.config
        if config.rank is not None:
            return min(config.rank, full)
        if config.fraction is not None:
            return max(1, round(config.fraction * full))
        if config.energy is not None and spectrum is not None:
            energy = spectrum.double().square().sum(0).cumsum(0)
            return min(full, int((energy < config.energy * energy[-1] * (1 - 1e-12)).sum()) + 1)
        return min(full, int((config.parameters or 0.5) * rows * columns / (rows + columns)))


def _why_not(scheme: Any, layer: nn.Module, shape: tuple[int, ...], rank: int) -> str | None:
    _, rows, columns = shape
    if rank == 0:
        return "even rank 1 has more parameters than asked for"
    if rank * (rows + columns) >= rows * columns:
        least = (rows * columns - 1) // (rows + columns)
        return f"at rank {rank} it would not have fewer parameters; that takes a rank of at most {least}"
    work = scheme.flops(layer, rank)
    if work >= 1:
        return f"at rank {rank} it would take {work:.2f} times the FLOPs, because of its stride"
    return None
