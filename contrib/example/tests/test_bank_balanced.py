"""pruning/bank-balanced keeps the rules of rarefy, and those of its paper."""

import copy

import torch
from rarefy.nouns import implement
from rarefy.testing import TechniqueConformance, small_model, small_task
from rarefy_bank_balanced.config import BankBalancedConfig
from rarefy_schemas import Finetune


class TestBankBalanced(TechniqueConformance):
    config = BankBalancedConfig()


class TestBankBalancedFineTuned(TechniqueConformance):
    config = BankBalancedConfig(amount=0.75, finetune=Finetune())


def test_every_bank_keeps_its_largest_weights() -> None:
    technique, model, task = implement(BankBalancedConfig(amount=0.75, bank=8)), small_model(), small_task()
    pruned = technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)
    before, after = model.hidden.weight.detach().reshape(-1, 8), pruned.hidden.weight.detach().reshape(-1, 8)
    assert (after.count_nonzero(1) == 2).all()
    assert torch.equal(after.abs().sum(1), before.abs().topk(2).values.sum(1))


def test_rows_that_do_not_fit_are_left_alone_with_the_reason() -> None:
    technique, model = implement(BankBalancedConfig(bank=16)), small_model()
    analysis = technique.analyze(model, small_task())
    skipped = {layer.name: layer.reason for layer in analysis.skipped}
    assert "18 weights" in skipped["stem"]
    assert "wide" in {layer.name for layer in analysis.layers}
