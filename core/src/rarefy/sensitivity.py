"""How much worse a changed model does, and which layer is to blame."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rarefy_schemas import TechniqueConfig
from torch import nn
from torch.utils._pytree import tree_leaves

from rarefy.errors import StageError
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.nouns import implement
from rarefy.progress import track
from rarefy.task import Task
from rarefy.technique import Technique


class Increase:
    """The increase of the mean loss over `model`'s on a few batches of the validation split.

    Without labels it is how far the outputs move on calibration inputs: `sum |y* - y|^2 / sum |y|^2`. `labelled` says
    which of the two it is; by default the first where the task has labels.
    """

    def __init__(self, model: nn.Module, task: Task, batches: int = 4, labelled: bool | None = None) -> None:
        self.task, self.labelled = task, task.has_labels if labelled is None else labelled
        if self.labelled:
            self.batches: list[Any] = list(itertools.islice(task.loader("validation"), batches))
        else:
            self.batches = list(task.calibration(batches=batches))
        if not self.batches:
            raise StageError("the task gives no batches to measure sensitivity on; give it validation data")
        self.loss = self._loss(model) if self.labelled else 0.0
        self.outputs = [] if self.labelled else list(self._outputs(model))

    def __call__(self, changed: nn.Module) -> float:
        """Return the increase of a model of the same outputs; below zero when it does better."""
        return self._loss(changed) - self.loss if self.labelled else self._moved(changed)

    def _loss(self, model: nn.Module) -> float:
        total, samples = 0.0, 0
        with evaluation(model), torch.no_grad():
            for batch in self.batches:
                size = len(self.task.labels(batch))
                outputs = model(*move(self.task.inputs(batch), device_of(model)))
                total += size * float(self.task.loss(outputs, batch))
                samples += size
        return total / samples

    def _outputs(self, model: nn.Module) -> Iterator[torch.Tensor]:
        with evaluation(model), torch.no_grad():
            for batch in self.batches:
                for leaf in tree_leaves(model(*move(batch, device_of(model)))):
                    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                        yield leaf.float()

    def _moved(self, changed: nn.Module) -> float:
        pairs = list(zip(self.outputs, self._outputs(changed), strict=True))
        moved = sum(float((after - before).square().sum()) for before, after in pairs)
        return moved / max(sum(float(before.square().sum()) for before, _ in pairs), 1e-30)


@dataclass(frozen=True)
class LayerEffect:
    """What a technique does to a model when it treats one layer alone."""

    name: str
    kind: str
    action: str
    increase: float | None
    """Increase of the loss, see `Increase`; None when the layer cannot be treated alone."""
    signal_to_noise: float | None
    """10 log10(|w|^2 / |w' - w|^2) of the layer's weight, in decibels; None when it stayed or is of another shape."""
    remark: str = ""


def layer_effects(
    model: nn.Module, config: TechniqueConfig, task: Task, increase: Increase | None = None
) -> list[LayerEffect]:
    """Apply a technique, without fine-tuning, to one layer at a time, and return what that does; `model` stays.

    The layers are those that the technique would treat. Raises `StageError` when there is none.
    """
    increase = increase or Increase(model, task)
    config = config.model_copy(update={"finetune": None})
    layers = _technique(config).analyze(model, task).layers
    if not layers:
        raise StageError(f"{config.registered_name()!r} would change no layer of this model")
    return [_alone(model, config, task, increase, layer.name, layer.kind) for layer in track(layers, "layer by layer")]


def _alone(
    model: nn.Module, config: TechniqueConfig, task: Task, increase: Increase, name: str, kind: str
) -> LayerEffect:
    targets = config.targets.model_copy(update={"include": (name,)})
    technique = _technique(config.model_copy(update={"targets": targets}))
    try:
        analysis = technique.analyze(model, task)
        changed = technique.consolidate(technique.transform(copy.deepcopy(model), analysis, task))
        action = next((layer.action for layer in analysis.layers if layer.name == name), "")
        return LayerEffect(name, kind, action, increase(changed), _signal_to_noise(model, changed, f"{name}.weight"))
    except StageError as error:
        return LayerEffect(name, kind, "", None, None, str(error))


def _technique(config: TechniqueConfig) -> Technique[Any]:
    technique: Technique[Any] = implement(config)
    return technique


def _signal_to_noise(before: nn.Module, after: nn.Module, name: str) -> float | None:
    one, other = (dict(model.named_parameters()).get(name) for model in (before, after))
    if one is None or other is None or one.shape != other.shape:
        return None
    signal, noise = (float(x.detach().double().square().sum()) for x in (one, other - one))
    return None if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
