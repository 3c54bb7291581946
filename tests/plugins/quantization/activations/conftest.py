"""What the tests of quantized activations share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from rarefy.nouns import implement
from rarefy.rules import rules_for
from rarefy.training import fit
from torch import nn


@pytest.fixture
def quantized() -> Callable[..., nn.Module]:
    """Return what takes a model through a technique, as the pipeline does."""

    def run(model: nn.Module, config: Any, task: Any) -> nn.Module:
        technique = implement(config)
        changed = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
        if config.finetune is not None:
            fit(changed, model, task, config.finetune, rules=rules_for(technique, changed))
        return technique.consolidate(changed).eval()

    return run
