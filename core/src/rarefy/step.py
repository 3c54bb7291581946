"""One step: what a technique finds, the changed copy, its training, and the plain model that it ends in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rarefy_schemas import Finetune, TechniqueConfig
from torch import nn

from rarefy import distributed
from rarefy.errors import PluginError, RecipeError, StageError
from rarefy.measure.mode import device_of
from rarefy.nouns import implement
from rarefy.registry import Registry
from rarefy.rules import rules_for
from rarefy.seeds import seed_everything
from rarefy.soundness import one_zero_, refuse_broken_weights, try_out
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule


class Step:
    """A technique at work on a copy of a model.

    Making one analyzes `model` and changes a copy, `step.model`; then either `finetune` trains that with core's loop,
    or any other loop does: after `bring_rules`, it adds `penalty` to its loss and calls `before_step` and `after_step`
    around the optimizer's. `finish` returns the model with what training needed turned into plain layers.
    Raises `StageError` when nothing would change or the changed copy does not run.
    """

    def __init__(self, technique: Technique[Any], model: nn.Module, task: Task, registry: Registry) -> None:
        self.technique, self.task, self._registry = technique, task, registry
        self.rules: list[TrainingRule] = []
        self._finished = False
        self.analysis = self._analyze(model)
        self.model = self._changed(model)

    @property
    def notes(self) -> tuple[str, ...]:
        """Findings of the technique in words; `finish` may add some."""
        return tuple(self.technique.notes)

    def _analyze(self, model: nn.Module) -> Analysis:
        technique, config = self.technique, self.technique.config
        seed_everything(technique.seed)
        analysis = self._registry.hook.analyze(technique=technique, model=model, task=self.task)
        if not isinstance(analysis, Analysis):
            raise StageError(f"{type(technique).__name__}.analyze returned {analysis!r}; return an Analysis")
        if not analysis.layers and not config.traits.new_architecture and not config.allow_unchanged:
            reasons = "".join(f"\n  {layer.name}: {layer.reason}" for layer in analysis.skipped[:20])
            raise StageError(
                f"{config.registered_name()!r} would change nothing; set `allow_unchanged: true` to accept that."
                f"{reasons}"
            )
        return analysis

    def _changed(self, model: nn.Module) -> nn.Module:
        technique = self.technique
        seed_everything(technique.seed)
        changed = self._registry.hook.transform(
            technique=technique, model=copy.deepcopy(model), analysis=self.analysis, task=self.task
        )
        if not isinstance(changed, nn.Module):
            raise StageError(f"{type(technique).__name__}.transform returned {changed!r}; return a Module")
        changed.to(device_of(model))
        try_out(changed, self.task, device_of(model), technique.config.registered_name())
        distributed.same_everywhere_(changed)
        return changed

    def finetune(self, teacher: nn.Module, seed: int) -> tuple[dict[str, float], ...]:
        """Train the changed copy as the technique's options say, if they do; return the history."""
        config = self.technique.config.finetune
        if config is None:
            return ()
        return finetune(self._registry, self.technique, self.model, teacher, self.task, config, seed)

    def bring_rules(self) -> None:
        """Ask the technique for the rules that a loop of somebody else's has to call."""
        self.rules = rules_for(self.technique, self.model)

    def penalty(self) -> torch.Tensor:
        """Return what to add to the loss, a scalar."""
        found = [p for rule in self.rules if (p := rule.penalty(self.model)) is not None]
        return sum(found, torch.zeros((), device=device_of(self.model)))

    def before_step(self) -> None:
        """Read or change the gradients; call it right before the optimizer's step, after any clipping."""
        for rule in self.rules:
            rule.before_step(self.model)

    def after_step(self, progress: float, lr: float | None = None) -> None:
        """Change the weights; call it right after the optimizer's step.

        `progress` is the share of the training that is done, 0 to 1, and `lr` the learning rate of that step, which
        proximal steps need. Raises `StageError` for a `progress` outside of 0 and 1.
        """
        if not 0 <= progress <= 1:
            raise StageError(f"`progress` is the share of the training that is done, from 0 to 1, not {progress}")
        for rule in self.rules:
            rule.lr = lr
            rule.after_step(self.model, progress)

    def finish(self) -> nn.Module:
        """Return the model in plain layers and evaluation mode, after the training.

        Raises `StageError` when it was called before, or when weights are NaN or infinite.
        """
        if self._finished:
            raise StageError("this step is finished: its model is what `finish` returned the first time")
        self._finished = True
        model = self.technique.consolidate(self.model).eval()
        refuse_broken_weights(model)
        one_zero_(model)
        return model


def technique_of(config: TechniqueConfig) -> Technique[Any]:
    """Return the technique behind its options; raise `PluginError` when the class is of another kind."""
    technique = implement(config)
    if not isinstance(technique, Technique):
        raise PluginError(f"{config.implementation} is not a subclass of rarefy.Technique")
    return technique


def refuse_missing_labels(config: TechniqueConfig | Finetune | None, task: Task, place: str = "") -> None:
    """Raise `RecipeError`, which begins with `place`, when a step or a training needs labels and the task has none."""
    if task.has_labels or config is None:
        return
    if isinstance(config, TechniqueConfig):
        if config.needed_data() == "labelled":
            raise RecipeError(f"{place}{config.registered_name()!r} needs labels and the task has none")
        refuse_missing_labels(config.finetune, task, f"{place.removesuffix(': ')}.finetune: ".removeprefix("."))
    elif config.objective.needs_labels:
        raise RecipeError(
            f"{place}the objective {config.objective.registered_name()!r} needs labels and the task has none; use an "
            "objective that learns from the original model, or give the task labels"
        )


def finetune(
    registry: Registry,
    technique: Technique[Any] | None,
    model: nn.Module,
    teacher: nn.Module,
    task: Task,
    config: Finetune,
    seed: int,
) -> tuple[dict[str, float], ...]:
    """Train `model` in place with core's loop, or a plugin's; return the history."""
    trained = registry.hook.finetune(
        technique=technique, model=model, teacher=teacher, task=task, config=config, seed=seed
    )
    if trained.model is not model:
        raise StageError("the hook `finetune` must train the given model in place")
    return tuple(trained.history)
