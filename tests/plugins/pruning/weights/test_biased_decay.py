"""Biased weight decay: the penalty's slope, and that it empties weights instead of shrinking them all."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from rarefy.rules import rules_for
from rarefy.tasks import ClassificationTask
from rarefy.training import fit
from rarefy_pruning.weights.biased_decay import BiasedWeightDecay, exponential, hyperbolic
from rarefy_pruning.weights.config import BiasedWeightDecayConfig
from rarefy_schemas import Finetune
from torch import nn

FORMS = [hyperbolic, exponential]


def slope(form: Any, weight: torch.Tensor, sharpness: float) -> torch.Tensor:
    weight = weight.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(form(weight, sharpness).sum(), weight)
    return gradient


@pytest.mark.parametrize("sharpness", [0.5, 10.0, 300.0])
def test_the_slopes_are_those_worked_out_by_hand(sharpness: float) -> None:
    w = torch.tensor([-3.0, -0.4, -1e-3, 1e-3, 0.2, 5.0], dtype=torch.float64)
    reached = 1 + sharpness * w.abs()
    torch.testing.assert_close(slope(hyperbolic, w, sharpness), w.sign() / reached**2)
    torch.testing.assert_close(slope(exponential, w, sharpness), w.sign() * sharpness * torch.exp(-sharpness * w.abs()))


@pytest.mark.parametrize("form", FORMS)
def test_small_weights_are_decayed_more_and_none_past_a_bound(form: Any) -> None:
    w = torch.linspace(1e-3, 4, 200, dtype=torch.float64)
    assert bool((slope(form, w, 3.0).diff() < 0).all())
    assert bool((form(w, 3.0) < (1 / 3 if form is hyperbolic else 1)).all())
    # even, and zero with no slope at zero, so that zeros stay
    assert torch.equal(form(w, 3.0), form(-w, 3.0))
    assert form(torch.zeros(1), 3.0).item() == 0
    assert slope(form, torch.zeros(1), 3.0).item() == 0


def test_the_penalty_is_the_sum_times_the_strength(model: nn.Module) -> None:
    technique = BiasedWeightDecay(BiasedWeightDecayConfig(amount=0.5, strength=0.01, sharpness=2, finetune={}))
    penalty = technique.training_rule(model).penalty(model)
    w = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()]).abs()
    assert penalty is not None
    assert penalty.item() == pytest.approx(float(0.01 * (w / (1 + 2 * w)).sum()))


@pytest.mark.parametrize(("form", "strength"), [("hyperbolic", 0.02), ("exponential", 0.002)])
def test_it_trains_dense_and_prunes_in_the_end(
    form: Literal["hyperbolic", "exponential"], strength: float, model: nn.Module, blobs: ClassificationTask
) -> None:
    finetune = Finetune(epochs=60, lr=0.02)
    config = BiasedWeightDecayConfig(amount=0.35, form=form, strength=strength, finetune=finetune)
    technique = BiasedWeightDecay(config)
    plain, biased = copy.deepcopy(model), technique.transform(model, technique.analyze(model, blobs), blobs)
    fit(plain, model, blobs, finetune)
    fit(biased, model, blobs, finetune, rules_for(technique, biased))
    # many weights are next to nothing while others are large, and none is gone yet
    assert small(biased) > 0.35 > 0.1 > small(plain)
    assert flat(biased).max() > 0.5
    assert flat(biased).count_nonzero() == 144
    before = blobs.score(biased, "test")
    pruned = technique.consolidate(biased)
    assert int((flat(pruned) == 0).sum()) == round(0.35 * 144)
    # so taking them away changes nothing
    assert blobs.score(pruned, "test") == pytest.approx(before, abs=0.01)
    assert before > 0.9


def flat(model: Any) -> torch.Tensor:
    return torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()]).abs()


def small(model: nn.Module) -> float:
    return float((flat(model) < 0.02).float().mean())


def test_it_needs_fine_tuning() -> None:
    with pytest.raises(ValidationError, match="`schedule: at-end` works during fine-tuning: give `finetune`"):
        BiasedWeightDecayConfig(amount=0.5)
