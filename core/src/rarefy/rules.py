"""Training rules that core adds by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.technique import TrainingRule

if TYPE_CHECKING:
    from rarefy.technique import Technique


class KeepZeros(TrainingRule):
    """Hold the weights that are exactly zero now at zero, so that a later step cannot undo a pruning."""

    def __init__(self, model: nn.Module) -> None:
        self.zeros = {
            name: zeros
            for name, weight in model.named_parameters()
            if weight.dim() > 1 and (zeros := weight == 0).any()
        }

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Zero what was zero."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in self.zeros:
                    weight.masked_fill_(self.zeros[name], 0)


def rules_for(technique: Technique[Any] | None, model: nn.Module) -> list[TrainingRule]:
    """Return the technique's own rule and, where earlier steps left zeros to keep, `KeepZeros`."""
    if technique is None:
        return []
    own = technique.training_rule(model)
    rules = [own] if own is not None else []
    if technique.zeros_to_keep:
        rules.append(KeepZeros(model))
    return rules
