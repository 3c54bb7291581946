"""Batch norms measured anew: the statistics in closed form, what stays, and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.pipeline import run
from rarefy.recipe import load_recipe
from rarefy.recovery.config import BatchNormConfig
from rarefy.testing.subjects import Inputs
from torch import nn


def restated(model: nn.Module, task: Any, original: nn.Module | None = None, **options: Any) -> nn.Module:
    technique = implement(BatchNormConfig(**options))
    technique.original = original
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


def trained_elsewhere() -> nn.Sequential:
    """Return a network whose statistics are those of other data, one channel of it without any spread."""
    model = network()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[2].running_mean.copy_(torch.arange(5.0))
        model[2].running_var.copy_(torch.arange(1.0, 6.0))
    return model


def test_an_unchanged_network_keeps_its_statistics_on_any_data() -> None:
    model, state = trained_elsewhere(), copy.deepcopy(trained_elsewhere().state_dict())
    changed = restated(model, Inputs(torch.randn(40, 6) * 7 + 3), model)
    for name, tensor in state.items():
        assert torch.equal(changed.state_dict()[name], tensor)
        assert torch.equal(model.state_dict()[name], tensor)  # the original, measured too


def test_relative_statistics_are_the_change_of_those_measured() -> None:
    original, batch = trained_elsewhere(), torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[0].weight.mul_(0.3)
        model[0].bias.add_(2)
    changed = restated(model, Inputs(batch), original)[2]
    before, now = original[0](batch), model[0](batch)
    torch.testing.assert_close(changed.running_mean, torch.arange(5.0) + now.mean(0) - before.mean(0))
    share = (now.var(0) + 1e-5) / (before.var(0) + 1e-5)
    assert share[:4].allclose(torch.full((4,), 0.09), rtol=0.01)
    assert share[4] == 1  # nothing varies there, before or after
    torch.testing.assert_close(changed.running_var, torch.arange(1.0, 6.0) * share)
    absolute = restated(model, Inputs(batch), original, relative=False)[2]
    torch.testing.assert_close(absolute.running_mean, now.mean(0))


def test_a_batch_norm_of_another_width_gets_what_is_measured() -> None:
    model, batch = network(), torch.randn(40, 6)
    wide = nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).eval()
    technique = implement(BatchNormConfig())
    technique.original = wide
    assert technique.analyze(model, Inputs()).layers[0].action == "statistics over 16 batches"
    torch.testing.assert_close(restated(model, Inputs(batch), wide)[2].running_mean, model[0](batch).mean(0))


def test_a_run_measures_beside_its_original(tmp_path: Path) -> None:
    steps = [{"technique": "pruning/magnitude", "amount": 0.5}, {"technique": "recovery/batch-norm"}]
    recipe = load_recipe({"name": "beside", "task": "data:digits", "evaluate": {"batch_sizes": []}, "steps": steps})
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 10))
    report = run(recipe, tmp_path / "run", model=model).report
    assert [layer.action for layer in report.steps[-1].layers] == ["change of the statistics over 16 batches"]


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
