"""The library's front door: what the command line does in five lines of Python, and single steps for other loops."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rarefy_schemas import Evaluate, ExporterConfig, ExportReport, Finetune, Recipe, StageReport, TechniqueConfig
from torch import nn

from rarefy.errors import RecipeError
from rarefy.exporting import export_to, float32_bytes
from rarefy.measure import measure
from rarefy.measure.mode import device_of, evaluation
from rarefy.modules import as_base
from rarefy.nouns import implementation
from rarefy.pipeline import Result, run
from rarefy.recipe import load_recipe
from rarefy.registry import get
from rarefy.report.gain import Gain
from rarefy.seeds import derive, seeded
from rarefy.soundness import refuse_broken_weights, refuse_unfit_inputs, refuse_wrapped
from rarefy.step import Step, refuse_missing_labels, technique_of
from rarefy.task import Task
from rarefy.tasks.inputs import as_task
from rarefy.technique import Analysis

if TYPE_CHECKING:
    import torch

    Data = Task | torch.Tensor | tuple[torch.Tensor, ...]
    Options = str | Mapping[str, Any] | TechniqueConfig


def compress(
    model: nn.Module | None,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    task: Task | None = None,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Compress `model` by `recipe` and return the new model with its report; `model` itself stays as it is.

    `model` and `task` may be None when the recipe names them. Without `directory` the run's files go to a new
    temporary folder, named in the result.
    Raises `RecipeError` for a wrong recipe and `StageError` when a step fails.
    """
    folder = Path(directory) if directory is not None else Path(tempfile.mkdtemp(prefix="rarefy-"))
    return run(load_recipe(recipe), folder, model=model, task=task, resume=resume)


def analyze(model: nn.Module, technique: Options, data: Data) -> Analysis:
    """Say what a technique would do to each layer of `model`, without changing it; `data` is as in `transform`."""
    refuse_wrapped(model)
    return technique_of(_config(technique)).analyze(model, as_task(data))


def transform(model: nn.Module, technique: Options, data: Data, *, seed: int = 0) -> nn.Module:
    """Return a copy of `model` treated by one technique, in evaluation mode; `model` itself stays as it is.

    `technique` is what a step of a recipe is, `{"technique": "pruning/channel-l1", "amount": 0.5}`, or a name where the
    defaults will do. With `finetune` in it core's loop trains the copy, and `model` can teach. `data` is a task, or
    inputs of the model, a tensor or a tuple with one tensor per positional argument, first dimension samples; these
    have no labels. Random numbers come from `seed`; the CPU's global generators stay as they were.
    Raises `RecipeError` for wrong options or data, and `StageError` when the step fails.
    """
    config, task = _config(technique), as_task(data)
    now = original = _copy(model)
    for number, part in enumerate(config.parts()):
        refuse_missing_labels(part, task)
        with seeded(seed):
            step = _step(part, now, original, task, derive(seed, "step", number))
            step.finetune(original, derive(seed, "finetune", number))
            now = step.finish()
    return now


def begin(model: nn.Module, technique: Options, data: Data, *, seed: int = 0) -> Step:
    """Do what `transform` does up to the training, and leave that to a loop of your own.

    Train `step.model`, a changed copy in training mode, on the device that `model` is on: add `step.penalty()` to the
    loss, call `step.before_step()` and `step.after_step(progress, lr)` around each step of the optimizer, and take the
    result from `step.finish()`.
    `finetune`, filled in when it is absent, trains nothing here; it says what your optimizer is to techniques that ask,
    as those with proximal steps, which want to know its kind and its momentum.
    Raises as `transform` does, and `RecipeError` for options that stand for several steps.
    """
    config = _config(technique, trains=True)
    if len(config.parts()) > 1:
        raise RecipeError(f"{config.registered_name()!r} has `rounds`, each with a training: begin one after the other")
    task, original = as_task(data), _copy(model)
    refuse_missing_labels(config.model_copy(update={"finetune": None}), task)
    with seeded(seed):
        step = _step(config, original, original, task, derive(seed, "step", 0))
        step.bring_rules()
    step.model.train()
    return step


def gain(
    model: nn.Module,
    data: Data,
    *,
    original: nn.Module,
    batch_sizes: Sequence[int] = (1,),
    rounds: int = 20,
    threads: int | None = None,
) -> Gain:
    """Measure a compressed model beside its original; print the result, or read single figures from it.

    Parameters, zeros, FLOPs per sample, peak memory and, at each of `batch_sizes`, the ratio of times: medians of
    `rounds` timings of either network in turn, with quartiles, on `threads` threads (torch's number when absent). The
    task's metric on the validation split where `data` is a task with labels.
    Raises `RecipeError` for wrong options or data, and `StageError` when a network does not run on the data.
    """
    task = as_task(data)
    try:
        config = Evaluate(batch_sizes=tuple(batch_sizes), rounds=rounds, threads=threads)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise RecipeError(f"{wrong['loc'][0]}: {wrong['msg']}") from None
    for network in (original, model):
        refuse_wrapped(network)
    with evaluation(model, original):
        for network in (original, model):
            refuse_unfit_inputs(network, task, device_of(network))
        found = measure(model, original, task, config)
        before = task.score(original, "validation")
    return Gain(task.metric, before, StageReport(index=0, name="compressed", measurements=tuple(found)))


def export(
    model: nn.Module,
    path: str | Path,
    data: Data,
    *,
    original: nn.Module | Callable[[], nn.Module],
    format: str | Mapping[str, Any] | ExporterConfig = "rarefy",
) -> ExportReport:
    """Write a compressed model as one file, open it again, compare its outputs, and report bytes and difference.

    `original` is the network before it was compressed, or a function that builds it; a `.rarefy` file needs it again
    when it is loaded. `format` is what an entry of `export` in a recipe is: a name, or a name with options, of
    which `name` does nothing here.
    Raises `RecipeError` for wrong options or an ending that is not the format's, and `StageError` when the model does
    not fit the format; then no file is left.
    """
    config, path, base, task = _format(format), Path(path), as_base(original), as_task(data)
    suffix = Path(f"model{implementation(type(config)).suffix}").suffix
    if path.suffix != suffix:
        raise RecipeError(f"files of the format {config.registered_name()!r} end in {suffix!r}, not {path.suffix!r}")
    refuse_wrapped(model)
    with evaluation(model):
        refuse_unfit_inputs(model, task, device_of(model))
    return export_to(path, model, base, task, config, float32_bytes(base))


def _config(technique: Options, trains: bool = False) -> TechniqueConfig:
    """Return the options of a technique; those absent have their defaults, `finetune` too where training follows."""
    if isinstance(technique, TechniqueConfig):
        config = technique
    else:
        step: dict[str, Any] = {"technique": technique} if isinstance(technique, str) else dict(technique)
        if trains and step.get("finetune") is None:
            step["finetune"] = {}
        config = load_recipe({"steps": [step]}).steps[0]
    return config.model_copy(update={"finetune": Finetune()}) if trains and config.finetune is None else config


def _format(format: str | Mapping[str, Any] | ExporterConfig) -> ExporterConfig:
    if isinstance(format, ExporterConfig):
        return format
    entry = format if isinstance(format, str) else dict(format)
    step = {"technique": "recovery/batch-norm"}  # a recipe has at least one
    return load_recipe({"steps": [step], "export": [entry]}).export[0]


def _copy(model: nn.Module) -> nn.Module:
    refuse_wrapped(model)
    return copy.deepcopy(model).eval()


def _step(config: TechniqueConfig, model: nn.Module, original: nn.Module, task: Task, seed: int) -> Step:
    refuse_broken_weights(model)
    refuse_unfit_inputs(model, task, device_of(model))
    technique = technique_of(config)
    technique.seed, technique.original = seed, original
    technique.zeros_to_keep = config.traits.keeps_zeros
    return Step(technique, model, task, get())
