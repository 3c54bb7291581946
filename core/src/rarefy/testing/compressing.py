"""How the kit takes a technique through its moments."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from rarefy_schemas import TechniqueConfig
from torch import nn

from rarefy.modules import Base
from rarefy.nouns import implement
from rarefy.references import build_model
from rarefy.rules import rules_for
from rarefy.technique import Analysis, Technique
from rarefy.testing.nouns import NounConformance


@dataclass(frozen=True)
class Outcome:
    """What a technique made of a model."""

    analysis: Analysis
    model: nn.Module
    base: Base


class Compressing(NounConformance):
    """What the rules for techniques have in common."""

    config: TechniqueConfig
    parent = Technique
    seed = 1
    _compressed: ClassVar[tuple[TechniqueConfig, Outcome] | None] = None

    def _technique(self, config: TechniqueConfig | None = None) -> Technique[Any]:
        self._noun()
        technique: Technique[Any] = implement(config or self.config)
        technique.seed = self.seed
        return technique

    def _outcome(self) -> Outcome:
        """Return what becomes of `self.model()`, worked out once for all rules that only look at it."""
        kit = type(self)
        known = vars(kit).get("_compressed")  # not a parent's: its model may be another
        if known is None or known[0] is not self.config:
            known = kit._compressed = (self.config, self._compress(self.model()))
        return known[1]

    def _compress(
        self, model: nn.Module, config: TechniqueConfig | None = None, zeros_to_keep: bool = False
    ) -> Outcome:
        """Do what the pipeline does for a step."""
        technique, task = self._technique(config), self.task()
        technique.zeros_to_keep = zeros_to_keep
        analysis = technique.analyze(model, task)
        changed = technique.transform(copy.deepcopy(model), analysis, task)
        finetune = technique.config.finetune
        if finetune is not None:
            from rarefy.training import fit

            short = finetune.model_copy(update={"epochs": 1, "max_steps": 3})
            fit(changed, copy.deepcopy(model), task, short, rules_for(technique, changed), self.seed)
        reference = technique.new_reference()
        base = Base(lambda: copy.deepcopy(model) if reference is None else build_model(reference), reference)
        return Outcome(analysis, technique.consolidate(changed).eval(), base)
