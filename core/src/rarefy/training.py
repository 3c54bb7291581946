"""Fine-tuning: one loop on accelerate, so launch on several processes and mixed precision come from there."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rarefy_schemas import Finetune
from torch import nn

from rarefy.augmentation import augmented
from rarefy.errors import StageError
from rarefy.nouns import implement
from rarefy.progress import track
from rarefy.seeds import seed_everything
from rarefy.task import Task
from rarefy.technique import TrainingRule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained model and how the training went."""

    model: nn.Module
    history: tuple[dict[str, float], ...] = ()
    """Per epoch: `epoch`, `loss` (mean over the batches) and `validation` (the task's metric)."""


def fit(
    model: nn.Module,
    teacher: nn.Module,
    task: Task,
    config: Finetune,
    rules: Sequence[TrainingRule] = (),
    seed: int = 0,
) -> Trained:
    """Train `model` in place.

    Raises `StageError` when the loss stops being finite.
    """
    seed_everything(seed)
    loader = task.loader("train", config.batch_size, shuffle=True, seed=seed)
    steps = math.ceil(len(loader) / _processes()) * config.epochs
    steps = min(steps, config.max_steps or steps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if steps == 0 or not parameters:
        return Trained(model)
    engine = _engine(config, next(model.parameters()).device)
    if config.memory_format == "channels_last":
        _arrange_((model, teacher), torch.channels_last)
    optimizer = _optimizer(parameters, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config))
    attributes = dict(vars(model))
    wrapped, optimizer, loader = engine.prepare(model, optimizer, loader)
    was_training, teacher_training = model.training, teacher.training
    loop = _Loop(engine, wrapped, model, teacher.eval(), task, config, rules, optimizer, schedule, steps)
    model.train()
    try:
        history = _epochs(loop, loader)
    finally:
        model.train(was_training)
        teacher.train(teacher_training)
        if config.memory_format == "channels_last":
            _arrange_((model, teacher), torch.contiguous_format)
        _restore_forward_(model, attributes)
        for parameter in parameters:
            parameter.grad = None
    return Trained(model, tuple(history))


def _arrange_(models: Sequence[nn.Module], memory_format: torch.memory_format) -> None:
    """Lay all four-dimensional tensors of models out; what a convolution gives follows its kernel."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)


def _restore_forward_(model: nn.Module, before: dict[str, Any]) -> None:
    """Take away the forward that mixed precision put in the place of the model's own."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
        if name in before:
            vars(model)[name] = before[name]


@dataclass
class _Loop:
    engine: Any
    wrapped: nn.Module
    model: nn.Module
    teacher: nn.Module
    task: Task
    config: Finetune
    rules: Sequence[TrainingRule]
    optimizer: Any
    schedule: Any
    steps: int
    done: int = 0

    def step(self, batch: Any, objective: Any) -> float:
        if self.config.augment is not None:
            batch = augmented(batch, self.task, self.config.augment)
        with self.engine.autocast():
            loss = objective.loss(self.wrapped, self.teacher, batch, self.task)
        penalties = [p for rule in self.rules if (p := rule.penalty(self.model)) is not None]
        loss = loss + sum(penalties) if penalties else loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise StageError(
                f"the training loss became {value} at step {self.done + 1} of {self.steps}; lower `lr` (now "
                f"{self.config.lr}), set `clip_norm`, or check the data for values that are not finite"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.backward(loss)
        if self.config.clip_norm is not None:
            self.engine.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        elif self.rules:
            self.engine.unscale_gradients()  # clipping does so by itself, and twice is an error
        for rule in self.rules:
            rule.before_step(self.model)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        for rule in self.rules:
            rule.lr = rate
            rule.after_step(self.model, self.done / self.steps)
        return value


def _epochs(loop: _Loop, loader: Any) -> list[dict[str, float]]:
    objective = implement(loop.config.objective)
    history: list[dict[str, float]] = []
    best, best_state, since_best = -math.inf, None, 0
    watch = loop.config.keep == "best" or loop.config.patience is not None
    for epoch in range(1, loop.config.epochs + 1):
        losses = []
        for batch in track(loader, f"epoch {epoch}/{loop.config.epochs}", total=len(loader)):
            losses.append(loop.step(batch, objective))
            if loop.done >= loop.steps:
                break
        score = loop.task.score(loop.model, "validation")
        history.append({"epoch": float(epoch), "loss": sum(losses) / len(losses), "validation": score})
        gain = score if loop.task.higher_is_better else -score
        if watch and gain > best:
            best, since_best = gain, 0
            best_state = copy.deepcopy(loop.model.state_dict()) if loop.config.keep == "best" else None
        elif watch:
            since_best += 1
        if loop.done >= loop.steps or (loop.config.patience is not None and since_best >= loop.config.patience):
            break
    if best_state is not None:
        loop.model.load_state_dict(best_state)
    return history


def _processes() -> int:
    from rarefy.distributed import world_size

    return world_size()


def _engine(config: Finetune, device: torch.device) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    # the state is one per process and refuses another precision; every fine-tuning brings its own
    AcceleratorState._reset_state(reset_partial_state=False)
    data = DataLoaderConfiguration(use_seedable_sampler=True, even_batches=True)
    if device.type == "cpu" and config.precision != "no" and not _fast_on_this_processor(config.precision):
        log.warning(
            "this processor has no fast instructions for %s, so that `precision: no` may well be several times faster",
            config.precision,
        )
    return Accelerator(cpu=device.type == "cpu", mixed_precision=config.precision, dataloader_config=data)


def _fast_on_this_processor(precision: str) -> bool:
    """Tell whether torch's kernels for the processor compute in half precision at all, or convert; True when unsure."""
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return ask is None or bool(ask())


def _optimizer(parameters: list[nn.Parameter], config: Finetune) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _rate(step: int, steps: int, config: Finetune) -> float:
    """Return the factor on the learning rate before optimizer step `step` (0-based) of `steps`."""
    warmup = int(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1 - share if config.schedule == "linear" else 1.0
