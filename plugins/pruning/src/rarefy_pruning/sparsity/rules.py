"""The two ways to train under a sum of norms: proximal steps, or a penalty in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rarefy.errors import StageError
from rarefy.technique import TrainingRule
from rarefy_schemas import Finetune
from torch import nn

from rarefy_pruning.sparsity.config import Method
from rarefy_pruning.sparsity.slices import Structures, norms, scale_, shrunk


class _Weighted(TrainingRule):
    """Structures with the weight `strength * w_g` of each norm."""

    def __init__(
        self, structures: Sequence[Structures], model: nn.Module, strength: float, weighted: bool = False
    ) -> None:
        named = dict(model.named_parameters())
        self.structures = structures
        self.weights = [
            strength * (part.sizes(named).sqrt() if weighted else torch.ones(len(part))) for part in structures
        ]


class NormPenalty(_Weighted):
    """Adds `strength * sum_g w_g ||theta_g||` to the loss; structures come near zero and never reach it."""

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Return the weighted sum of norms."""
        named = dict(model.named_parameters())
        terms = []
        for part, weights in zip(self.structures, self.weights, strict=True):
            found = norms(part, named)
            terms.append((weights.to(found) * found).sum())
        return torch.stack(terms).sum()


class ProximalSteps(_Weighted):
    """Shrinks each structure after each optimizer step, by step size times weight; what died stays dead.

    After a step of plain gradient descent this is forward-backward splitting. Momentum makes the steps of sgd
    `1 / (1 - momentum)` times as long in the long run, and the shrinkage follows, so that training settles where the
    loss plus the penalty has its minimum. Adam divides each gradient by its own size; the shrinkage does not, as the
    decoupled weight decay of AdamW does not. The strength is then relative to Adam's steps, which are about the
    learning rate per weight, and no longer to the loss. Structures that share weights are shrunk one set after the
    other (an incremental proximal method: Bertsekas 2011), which is the joint operator to first order in the step size.
    """

    def __init__(
        self,
        structures: Sequence[Structures],
        model: nn.Module,
        strength: float,
        finetune: Finetune,
        weighted: bool = False,
    ) -> None:
        super().__init__(structures, model, strength, weighted)
        self.stretch = 1 / (1 - finetune.momentum) if finetune.optimizer == "sgd" else 1.0
        self.alive = [torch.ones(len(part), dtype=torch.bool) for part in structures]

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        """Apply the proximal operator; raise `StageError` when the trainer does not tell its learning rate."""
        if self.lr is None:
            raise StageError(
                "proximal steps need the learning rate: pass `lr` to `step.after_step` in a loop of your own, let a "
                "plugin's trainer set `lr` of its rules, or use `method: penalty`"
            )
        named = dict(model.named_parameters())
        for i, (part, weights) in enumerate(zip(self.structures, self.weights, strict=True)):
            found = norms(part, named)
            factors = shrunk(found, self.lr * self.stretch * weights.to(found))
            # batch norm would blow up the gradient of a dead filter in front of it and bring back noise
            self.alive[i] = self.alive[i].to(found.device) & (factors > 0)
            scale_(part, named, factors * self.alive[i])


def training_rule(
    method: Method,
    structures: Sequence[Structures],
    model: nn.Module,
    strength: float,
    finetune: Finetune,
    weighted: bool,
) -> TrainingRule | None:
    """Return the rule of a method; None when there is nothing to regularise."""
    if not structures:
        return None
    if method == "penalty":
        return NormPenalty(structures, model, strength, weighted)
    return ProximalSteps(structures, model, strength, finetune, weighted)
