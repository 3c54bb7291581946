"""Batch norms measured anew: the statistics in closed form, what stays, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.recovery.config import BatchNormConfig
from rarefy.testing.subjects import Inputs
from torch import nn


def restated(model: nn.Module, task: Any, **options: Any) -> nn.Module:
    technique = implement(BatchNormConfig(**options))
    return technique.transform(copy.deepcopy(model), technique.analyze(model, task), task)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()


def test_statistics_are_means_over_batches_and_nothing_else_changes() -> None:
    model, draw = network(), torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 6, generator=draw) * scale for scale in (1, 3)]
    changed = restated(model, Inputs(*batches))
    seen = [model[0](batch) for batch in batches]  # no dropout
    torch.testing.assert_close(changed[2].running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(changed[2].running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    old = model.state_dict()
    for name, tensor in changed.state_dict().items():
        assert torch.equal(tensor, old[name]) == (name not in ("2.running_mean", "2.running_var"))
    assert not changed[2].training
    assert changed[2].momentum == 0.1


def test_what_a_change_of_scale_did_is_undone() -> None:
    model, batch = network(), torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    exact = restated(model, Inputs(batch))
    scaled = copy.deepcopy(exact)
    with torch.no_grad():
        scaled[0].weight.mul_(0.3)
        scaled[0].bias.mul_(0.3)
    assert not torch.allclose(scaled(batch), exact(batch), atol=0.01)
    torch.testing.assert_close(restated(scaled, Inputs(batch))(batch), exact(batch), atol=1e-3, rtol=1e-3)


def test_batch_norms_without_statistics_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5))
    analysis = implement(BatchNormConfig()).analyze(model, Inputs())  # type: ignore[arg-type]
    assert [(skip.name, "no statistics" in skip.reason) for skip in analysis.skipped] == [("1", True)]
    assert [layer.name for layer in analysis.layers] == ["2"]


def test_errors_leave_the_old_statistics() -> None:
    model = network()
    technique = implement(BatchNormConfig())
    for data, told in ((Inputs(), "no calibration data"), (Inputs(torch.full((4, 6), torch.nan)), "NaN or infinite")):
        tried = copy.deepcopy(model)
        with pytest.raises(StageError, match=told):
            technique.transform(tried, technique.analyze(tried, data), data)
        old = model.state_dict()
        assert all(torch.equal(tensor, old[name]) for name, tensor in tried.state_dict().items())
    with pytest.raises(StageError, match="no layer matches"):
        technique.analyze(nn.Sequential(nn.Linear(2, 2)), Inputs())  # type: ignore[arg-type]
