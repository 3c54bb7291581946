"""The run: baseline, steps, exports, report. Any stage that finished is never done again."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy_schemas import (
    BudgetReport,
    ExportReport,
    Measurement,
    Recipe,
    Report,
    StageReport,
    TechniqueConfig,
)
from torch import nn

from rarefy import artifact, distributed
from rarefy.environment import environment
from rarefy.errors import PluginError, RecipeError
from rarefy.files import atomic_write
from rarefy.measure import histograms, layer_parameters
from rarefy.modules import Base
from rarefy.order import check_order
from rarefy.progress import track
from rarefy.recipe import dump_recipe
from rarefy.references import build_model, build_task
from rarefy.registry import Registry, get
from rarefy.report import render, words
from rarefy.rundir import RunDir
from rarefy.seeds import derive
from rarefy.soundness import refuse_broken_weights, refuse_other_outputs, refuse_wrapped
from rarefy.step import Step, finetune, refuse_missing_labels, technique_of
from rarefy.task import Task
from rarefy.technique import Technique

log = logging.getLogger("rarefy")


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    model: nn.Module
    report: Report
    directory: Path

    @property
    def missed(self) -> list[BudgetReport]:
        """Budgets of the recipe that were not kept."""
        return [budget for budget in self.report.budgets if not budget.met]


@dataclass
class _State:
    """A model between two stages, and the skeleton it is described against."""

    model: nn.Module
    base: Base
    reports: list[StageReport]


class Pipeline:
    """One run of one recipe in one folder."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        model: nn.Module | None = None,
        task: Task | None = None,
        registry: Registry | None = None,
    ) -> None:
        steps = tuple(part for step in recipe.steps for part in step.parts())
        recipe = recipe.model_copy(update={"steps": steps})
        check_order(recipe.steps)
        self.recipe, self.registry, self.folder = recipe, registry or get(), RunDir(directory)
        self.techniques = [self._technique(i, config) for i, config in enumerate(recipe.steps)]
        self.given = model
        self.task = task if task is not None else _task(recipe)
        self._check_data()

    def run(self, *, resume: bool = False) -> Result:
        """Do what the recipe says, going on after the last finished stage when `resume` is set."""
        distributed.start(self.recipe.device)
        if not distributed.is_main():
            return self._run()
        with self.folder.lock():
            self.folder.open(self.recipe, resume=resume)
            with self.folder.logging():
                return self._run()

    def _run(self) -> Result:
        distributed.wait()
        began = time.monotonic()
        original, base = self._original()
        state = self._baseline(original, base)
        original = copy.deepcopy(state.model)
        for index in range(len(self.techniques)):
            self._step(index, state, original)
        finished = distributed.from_main(self.folder.report() if distributed.is_main() else None)
        if finished is None:
            finished = distributed.from_main(
                self._finish(state, original, time.monotonic() - began) if distributed.is_main() else None
            )
        assert finished is not None
        return Result(state.model, finished, self.folder.path)

    # The baseline

    def _original(self) -> tuple[nn.Module, Base]:
        reference = self.recipe.model
        if self.given is not None:
            given = self.given
            refuse_wrapped(given)
            return copy.deepcopy(given), Base(lambda: copy.deepcopy(given), reference)
        if reference is None:
            raise RecipeError("the recipe names no `model`, and none was given")
        seed = derive(self.recipe.seed, "model")
        return build_model(reference, load_weights=True, seed=seed), Base(lambda: build_model(reference), reference)

    def _baseline(self, original: nn.Module, base: Base) -> _State:
        state = _State(original.to(self.recipe.device), base, [])
        if self._restore(-1, state):
            return state
        began = time.monotonic()
        refuse_broken_weights(state.model)
        training: tuple[dict[str, float], ...] = ()
        if self.recipe.train_first is not None:
            log.info("training the model before anything is compressed")
            seed = derive(self.recipe.seed, "finetune", -1)
            training = finetune(self.registry, None, state.model, state.model, self.task, self.recipe.train_first, seed)
        state.model.eval()
        if distributed.is_main():
            self._save_original(state.model)
        self._finish_stage(state, state.model, StageReport(index=-1, name="original", training=training), began)
        return state

    def _save_original(self, model: nn.Module) -> None:
        from safetensors.torch import save_model

        with atomic_write(self.folder.path / "original.safetensors") as temporary:
            save_model(model, str(temporary))

    # One step

    def _technique(self, index: int, config: TechniqueConfig) -> Technique[Any]:
        technique = technique_of(config)
        technique.seed = derive(self.recipe.seed, "step", index)
        earlier = self.recipe.steps[:index]
        technique.zeros_to_keep = config.traits.keeps_zeros and any(step.traits.makes_zeros for step in earlier)
        return technique

    def _step(self, index: int, state: _State, original: nn.Module) -> None:
        technique = self.techniques[index]
        reference = technique.new_reference()
        if reference is not None:
            state.base = Base(lambda: build_model(reference), reference)
        if self._restore(index, state):
            return
        name = technique.config.name or technique.config.registered_name()
        log.info("step %d of %d: %s", index + 1, len(self.techniques), name)
        began = time.monotonic()
        technique.original = original
        step = Step(technique, state.model, self.task, self.registry)
        training = step.finetune(original, derive(self.recipe.seed, "finetune", index))
        model = step.finish()
        report = StageReport(
            index=index,
            name=name,
            technique=technique.config.registered_name(),
            config=technique.config.model_dump(mode="json"),
            layers=step.analysis.layers,
            skipped=step.analysis.skipped,
            training=training,
            notes=step.notes,
        )
        state.model = model
        self._finish_stage(state, original, report, began)

    # Checkpoints

    def _restore(self, index: int, state: _State) -> bool:
        report = distributed.from_main(self.folder.stage(index) if distributed.is_main() else None)
        if report is None:
            return False
        state.model = artifact.load(self.folder.checkpoint(index), base=state.base.build).to(self.recipe.device).eval()
        state.reports.append(report)
        log.info("%s is already done", report.name)
        return True

    def _finish_stage(self, state: _State, original: nn.Module, report: StageReport, began: float) -> None:
        """Write the checkpoint, go on with what it gives back, and measure that.

        Going on with the re-opened model makes an interrupted run equal to an unbroken one, and shows at once when
        something of the model is not in the file.
        """
        before = state.model
        path = self.folder.checkpoint(report.index)
        if distributed.is_main():
            artifact.write(before, state.base, path)
        distributed.wait()
        state.model = artifact.load(path, base=state.base.build).to(self.recipe.device).eval()
        refuse_other_outputs(before, state.model, self.task, self.recipe.device)
        if distributed.is_main():
            report = self._measured(state, original, report)
            report = report.model_copy(update={"seconds": time.monotonic() - began})
            self.folder.finish_stage(report)
        state.reports.append(report)
        distributed.wait()

    def _measured(self, state: _State, original: nn.Module, report: StageReport) -> StageReport:
        log.info("measuring %s", report.name)
        found = self._measurements(state.model, original)
        size = self.folder.checkpoint(report.index).stat().st_size
        full = (self.folder.path / "original.safetensors").stat().st_size
        found.append(Measurement(name="bytes", value=size, unit="bytes", better="lower"))
        found.append(Measurement(name="bytes_rate", value=full / size, unit="x", better="higher"))
        report = report.model_copy(
            update={
                "measurements": tuple(found),
                "layer_parameters": layer_parameters(state.model),
                "histograms": tuple(histograms(state.model)),
            }
        )
        notes = words(report, state.reports[-1] if state.reports else None)
        return report.model_copy(update={"notes": (*report.notes, *notes)})

    def _measurements(self, model: nn.Module, original: nn.Module) -> list[Measurement]:
        answers = self.registry.hook.evaluate(
            model=model, original=original, task=self.task, config=self.recipe.evaluate
        )
        found: dict[str, Measurement] = {}
        for measurement in (m for answer in reversed(answers) for m in answer):
            if measurement.name in found:
                raise PluginError(f"two plugins measure {measurement.name!r}; block one of them")
            found[measurement.name] = measurement
        return list(found.values())

    # The end

    def _finish(self, state: _State, original: nn.Module, seconds: float) -> Report:
        exports = self._exports(state)
        test = self._test(state.model, original)
        recipe = dump_recipe(self.recipe)
        report = Report(
            name=self.recipe.name,
            status="done",
            metric=self.task.metric,
            recipe=recipe,
            seed=self.recipe.seed,
            baseline=state.reports[0],
            steps=tuple(state.reports[1:]),
            test=test,
            exports=exports,
            budgets=self._budgets(state, test, exports),
            environment=environment(self.registry),
            seconds=seconds,
        )
        self.folder.write("report.html", render(report))
        self.folder.write("report.json", report.model_dump_json(indent=2))
        return report

    def _exports(self, state: _State) -> tuple[ExportReport, ...]:
        full = (self.folder.path / "original.safetensors").stat().st_size
        configs = self.recipe.export or (self.registry.exporters["rarefy"](),)
        done = []
        for config in track(configs, "exporting"):
            done.append(
                self.registry.hook.export(
                    model=copy.deepcopy(state.model).cpu(),
                    base=state.base,
                    task=self.task,
                    config=config,
                    directory=self.folder.exports,
                    original_bytes=full,
                )
            )
        return tuple(done)

    def _test(self, model: nn.Module, original: nn.Module) -> tuple[Measurement, ...]:
        log.info("measuring on the test split, once")
        before, after = self.task.score(original, "test"), self.task.score(model, "test")
        drop = before - after if self.task.higher_is_better else after - before
        better = "higher" if self.task.higher_is_better else "lower"
        return (
            Measurement(name="original", value=before, unit=self.task.metric, better=better),
            Measurement(name="compressed", value=after, unit=self.task.metric, better=better),
            Measurement(name="drop", value=drop, unit=self.task.metric, better="lower"),
        )

    def _budgets(
        self, state: _State, test: tuple[Measurement, ...], exports: tuple[ExportReport, ...]
    ) -> tuple[BudgetReport, ...]:
        limits, found = self.recipe.budgets, []
        if limits.accuracy_drop is not None:
            found.append(_budget("accuracy_drop", limits.accuracy_drop, test[2].value))
        if limits.bytes is not None:
            found.append(_budget("bytes", limits.bytes, min(export.bytes for export in exports)))
        if limits.latency is not None:
            speed_up = state.reports[-1].value(f"speed_up_rate@{self.recipe.evaluate.batch_sizes[0]}")
            found.append(_budget("latency", limits.latency, 1 / speed_up if speed_up else float("inf")))
        return tuple(found)

    def _check_data(self) -> None:
        if self.recipe.budgets.latency is not None and not self.recipe.evaluate.batch_sizes:
            raise RecipeError("budgets.latency needs at least one batch size in evaluate.batch_sizes")
        refuse_missing_labels(self.recipe.train_first, self.task, "train_first: ")
        for i, step in enumerate(self.recipe.steps):
            refuse_missing_labels(step, self.task, f"steps.{i}: ")


def run(
    recipe: Recipe,
    directory: Path,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    resume: bool = False,
    registry: Registry | None = None,
) -> Result:
    """Run `recipe` in the folder `directory` and return the compressed model with its report."""
    return Pipeline(recipe, directory, model, task, registry).run(resume=resume)


def _task(recipe: Recipe) -> Task:
    if recipe.task is None:
        raise RecipeError("the recipe names no `task`, and none was given")
    return build_task(recipe.task)


def _budget(name: str, limit: float, value: float) -> BudgetReport:
    return BudgetReport(name=name, limit=limit, value=min(value, 1e300), met=value <= limit + 1e-12)
