"""A run from recipe to report: what it writes, what it refuses, and that interruption costs nothing."""

from __future__ import annotations

import copy
import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import rarefy
import torch
from rarefy.errors import PluginError, RecipeError, StageError
from rarefy.pipeline import Pipeline, Result, run
from rarefy.recipe import load_recipe
from rarefy.tasks import ClassificationTask
from rarefy_schemas import Report
from torch import nn

RECIPE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "evaluate": {"batch_sizes": [1], "rounds": 3},
    "steps": [
        {
            "technique": "pruning/magnitude",
            "amount": 0.6,
            "finetune": {"epochs": 1, "objective": {"objective": "distillation/logits"}},
        },
        {"technique": "quantization/kmeans", "bits": 3, "finetune": {"epochs": 1, "lr": 1e-4}},
    ],
}


def recipe(**changes: Any) -> Any:
    return load_recipe({**copy.deepcopy(RECIPE), **changes})


def figures(report: Report) -> dict[str, Any]:
    """Return what a report says, without what depends on the clock."""
    data = report.model_dump(mode="json")
    for stage in (data["baseline"], *data["steps"]):
        stage.pop("seconds")
        stage.pop("notes")
        stage["measurements"] = [
            m for m in stage["measurements"] if "latency" not in m["name"] and "speed" not in m["name"]
        ]
    data.pop("seconds")
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trained: nn.Module, digits: ClassificationTask) -> Result:
    return run(recipe(), tmp_path_factory.mktemp("run") / "whole", model=trained, task=digits)


@pytest.fixture(scope="module")
def trained(trained_once: nn.Module) -> nn.Module:
    return trained_once


@pytest.fixture(scope="module")
def digits(digits_task: ClassificationTask) -> ClassificationTask:
    return digits_task


def test_a_run_leaves_model_report_page_and_file(whole: Result) -> None:
    folder = whole.directory
    assert {path.name for path in folder.iterdir()} >= {
        "recipe.yaml", "report.json", "report.html", "checkpoints", "exports", "run.log", "original.safetensors",
    }  # fmt: skip
    report = Report.model_validate(json.loads((folder / "report.json").read_text()))
    assert report == whole.report
    assert [stage.name for stage in report.steps] == ["pruning/magnitude", "quantization/kmeans"]
    assert "<html" in (folder / "report.html").read_text()
    export = report.exports[0]
    assert (folder / "exports" / Path(export.path).name).stat().st_size == export.bytes
    assert export.rate == pytest.approx((folder / "original.safetensors").stat().st_size / export.bytes)


def test_the_steps_did_what_they_say(whole: Result) -> None:
    weights = [m.weight for m in whole.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.6, abs=0.02)
    assert all(len(w.unique()) <= 8 for w in weights)
    pruned, shared = whole.report.steps
    assert shared.value("bytes") < pruned.value("bytes") < whole.report.baseline.value("bytes")


def test_the_original_stays_as_it_is(whole: Result, trained: nn.Module) -> None:
    assert not any((p == 0).all() for p in trained.parameters())
    assert len(trained.state_dict()) == len(whole.model.state_dict())


def test_the_file_gives_back_the_same_model(whole: Result, trained: nn.Module, digits: ClassificationTask) -> None:
    file = whole.directory / "exports" / Path(whole.report.exports[0].path).name
    loaded = rarefy.load(file, base=trained)
    inputs = digits.example_inputs(7)
    assert torch.equal(loaded.eval()(*inputs), whole.model(*inputs))
    assert digits.score(loaded, "test") == whole.report.test[1].value


def test_an_equal_run_gives_equal_bytes_and_figures(
    whole: Result, trained: nn.Module, digits: ClassificationTask, tmp_path: Path
) -> None:
    again = run(recipe(), tmp_path / "again", model=trained, task=digits)
    assert figures(again.report) == figures(whole.report)
    for file in (*(whole.directory / "checkpoints").glob("*.rarefy"), *(whole.directory / "exports").iterdir()):
        assert (again.directory / file.parent.name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stage", [-1, 0, 1, "export"])
def test_a_run_that_dies_goes_on_to_the_same_result(
    whole: Result, trained: nn.Module, digits: ClassificationTask, tmp_path: Path, monkeypatch: Any, stage: int | str
) -> None:
    def die(self: Pipeline, state: Any, *rest: Any) -> Any:
        if stage == "export" or rest[1].index == stage:
            raise KeyboardInterrupt
        return finish(self, state, *rest)

    name = "_exports" if stage == "export" else "_finish_stage"
    finish = getattr(Pipeline, name)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, name, die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), tmp_path, model=trained, task=digits)
    assert not (tmp_path / "report.json").exists()
    resumed = run(recipe(), tmp_path, model=trained, task=digits, resume=True)
    assert figures(resumed.report) == figures(whole.report)
    export = Path(whole.report.exports[0].path).name
    assert (tmp_path / "exports" / export).read_bytes() == (whole.directory / "exports" / export).read_bytes()


def test_resuming_a_finished_run_changes_nothing(whole: Result, trained: nn.Module, digits: ClassificationTask) -> None:
    before = (whole.directory / "report.json").read_bytes()
    again = run(recipe(), whole.directory, model=trained, task=digits, resume=True)
    assert (whole.directory / "report.json").read_bytes() == before
    assert again.report == whole.report


def test_folders_that_cannot_be_used(
    whole: Result, trained: nn.Module, digits: ClassificationTask, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="already holds a run"):
        run(recipe(), whole.directory, model=trained, task=digits)
    with pytest.raises(RecipeError, match="recipe differs"):
        run(recipe(seed=4), whole.directory, model=trained, task=digits, resume=True)
    with pytest.raises(RecipeError, match="no run to resume"):
        run(recipe(), tmp_path / "new", model=trained, task=digits, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="cannot create the folder"):
        run(recipe(), tmp_path / "file" / "run", model=trained, task=digits)


def test_two_runs_into_one_folder(trained: nn.Module, digits: ClassificationTask, tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StageError, match="another process is running"):
            run(recipe(), tmp_path, model=trained, task=digits)


def test_a_damaged_checkpoint_is_named(
    whole: Result, trained: nn.Module, digits: ClassificationTask, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(whole.directory, folder)
    (folder / "report.json").unlink()
    file = folder / "checkpoints" / "01.rarefy"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(rarefy.ArtifactError, match=r"01\.rarefy"):
        run(recipe(), folder, model=trained, task=digits, resume=True)
    (folder / "checkpoints" / "02.json").write_text("{")
    file.unlink()
    with pytest.raises(StageError, match=r"02\.json is damaged"):
        run(recipe(), folder, model=trained, task=digits, resume=True)


def test_budgets_are_checked_at_the_end(trained: nn.Module, digits: ClassificationTask, tmp_path: Path) -> None:
    budgets = {"accuracy_drop": 1.0, "bytes": 10, "latency": 100.0}
    result = run(recipe(budgets=budgets), tmp_path, model=trained, task=digits)
    assert {budget.name: budget.met for budget in result.report.budgets} == {
        "accuracy_drop": True, "bytes": False, "latency": True,
    }  # fmt: skip
    assert [budget.name for budget in result.missed] == ["bytes"]


def test_nan_weights_are_refused_before_anything_runs(
    trained: nn.Module, digits: ClassificationTask, tmp_path: Path
) -> None:
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(StageError, match="NaN or infinite"):
        run(recipe(), tmp_path, model=broken, task=digits)


def test_targets_that_match_nothing(trained: nn.Module, digits: ClassificationTask, tmp_path: Path) -> None:
    steps = [{"technique": "pruning/magnitude", "amount": 0.5, "targets": {"include": ["nowhere.*"]}}]
    with pytest.raises(StageError, match=r"no layer matches the targets .*nowhere"):
        run(recipe(steps=steps), tmp_path, model=trained, task=digits)


def test_a_task_without_labels_is_refused_where_labels_are_needed(trained: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(40, 1, 8, 8)
    task = ClassificationTask.from_arrays(x, None)
    steps = copy.deepcopy(RECIPE["steps"])
    steps[0]["finetune"]["objective"]["alpha"] = 1  # learns from the original alone
    with pytest.raises(RecipeError, match=r"steps\.1\.finetune: the objective 'task' needs labels"):
        run(recipe(steps=steps), tmp_path, model=trained, task=task)
    assert not (tmp_path / "checkpoints").exists()


def test_a_recipe_without_model_or_task(digits: ClassificationTask, trained: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names no `task`"):
        run(recipe(), tmp_path, model=trained)
    with pytest.raises(RecipeError, match="names no `model`"):
        run(recipe(), tmp_path, task=digits)


def test_state_that_no_file_can_hold_is_found_at_once(digits: ClassificationTask, tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.scale = [torch.rand(())]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1)) * self.scale[0]

        def __deepcopy__(self, memo: Any) -> Hidden:
            new = Hidden()
            new.load_state_dict(self.state_dict())
            return new

    with pytest.raises(StageError, match="Register such tensors as buffers"):
        run(recipe(), tmp_path, model=Hidden(), task=digits)


def test_negative_zeros_cost_nothing(trained: nn.Module, digits: ClassificationTask, tmp_path: Path) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():
        for module in (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            module.weight.mul_((module.weight.abs() > module.weight.abs().median()).float())
    assert any(bool((p.eq(0) & p.signbit()).any()) for p in model.parameters())
    steps = [{"technique": "quantization/kmeans", "bits": 3}]
    result = run(recipe(steps=steps), tmp_path, model=model, task=digits)
    assert not any(bool((p.eq(0) & p.signbit()).any()) for p in result.model.parameters())


def test_a_forward_that_reads_a_replaced_layer(digits: ClassificationTask, tmp_path: Path) -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x.flatten(1)) * self.one.out_features)

    step: dict[str, Any] = {"technique": "factorization/svd"}
    with pytest.raises(StageError, match=r"no longer runs: AttributeError.*targets\.exclude"):
        run(recipe(steps=[step]), tmp_path / "a", model=Curious(), task=digits)
    result = run(
        recipe(steps=[{**step, "targets": {"exclude": ["one"]}}]), tmp_path / "b", model=Curious(), task=digits
    )
    assert result.report.steps[0].layers[0].name == "two"


def test_a_step_that_would_change_nothing_is_an_error_unless_allowed(
    digits: ClassificationTask, tmp_path: Path
) -> None:
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    step = {"technique": "factorization/svd", "fraction": 1.0}
    with pytest.raises(StageError, match=r"would change nothing; set `allow_unchanged: true`[^$]*1: "):
        run(recipe(steps=[step]), tmp_path / "a", model=tiny, task=digits)
    result = run(recipe(steps=[{**step, "allow_unchanged": True}]), tmp_path / "b", model=tiny, task=digits)
    assert result.report.steps[0].skipped


def test_two_plugins_that_measure_one_name(trained: nn.Module, digits: ClassificationTask, tmp_path: Path) -> None:
    from rarefy.hookspecs import hookimpl
    from rarefy.registry import Registry, discover
    from rarefy_schemas import Measurement

    class Tracker:
        @hookimpl
        def evaluate(self, model: nn.Module) -> list[Measurement]:
            return [Measurement(name="bias_norm", value=1.0), Measurement(name="parameters", value=0)]

    registry = Registry(discover())
    registry.manager.register(Tracker(), "tracker")
    with pytest.raises(PluginError, match="two plugins measure 'parameters'"):
        run(recipe(), tmp_path, model=trained, task=digits, registry=registry)


def test_five_lines_in_a_notebook(trained: nn.Module, digits: ClassificationTask) -> None:
    result = rarefy.compress(trained, RECIPE, digits)
    assert result.report.steps[-1].value("bytes_rate") > 4
    analysis = rarefy.analyze(trained, {"technique": "pruning/magnitude", "amount": 0.5}, digits)
    assert analysis.layers
