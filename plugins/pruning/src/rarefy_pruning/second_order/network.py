"""Optimal Brain Surgeon on a whole small network, as it was published (Hassibi & Stork 1992)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rarefy.errors import StageError
from rarefy.measure.mode import device_of, evaluation, move
from rarefy.progress import Progress, track
from rarefy.rules import KeepZeros
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, TrainingRule
from rarefy.weights import LayerWeight, layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from rarefy_pruning.second_order.config import NetworkOBSConfig
from rarefy_pruning.second_order.elimination import eliminate

_IDLE = "the outputs do not change with its weights on the calibration data"
_AT_ONCE = 64
"""Number of output values that are differentiated at a time."""


class NetworkOBS(Technique[NetworkOBSConfig]):
    """Greedy removal among all weights; every removal corrects all weights and biases of the target layers.

    The error is the squared change of the outputs, mean over samples and output units, to second order; for a trained
    network that is the error on the data it fits. Its Hessian is the outer product of the outputs' gradients (eq. 12).
    """

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Prune a copy, and say what each layer keeps; refuse a network that is too large."""
        weights, skipped = layer_weights(model, self.config)
        self._refuse_large(weights)
        if not weights:
            return Analysis((), tuple(skipped), {})
        vectors = self._gradients(model, weights, task)
        effect = vectors.any(0).split([model.get_parameter(name).numel() for name in _names(weights)])
        idle = {n for n, part in zip(_names(weights), effect, strict=True) if n.endswith(".weight") and not part.any()}
        skipped += [_skip(w, _IDLE) for w in weights if f"{w.name}.weight" in idle]
        weights = [w for w in weights if f"{w.name}.weight" not in idle]
        total, have = _count(weights)
        zeros = min(round(self.config.amount * total), total - len(weights))
        if have >= zeros:
            reason = f"{have:,} of the weights are zero already and {zeros:,} are asked for"
            return Analysis((), (*skipped, *(_skip(w, reason) for w in weights)), {})
        pruned = copy.deepcopy(model)
        self._prune_(pruned, weights, have, zeros, task)
        plan = {name: pruned.get_parameter(name).detach() for name in _names(weights)}
        return Analysis(tuple(_report(w, plan[f"{w.name}.weight"]) for w in weights), tuple(skipped), plan)

    @torch.no_grad()
    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Write the planned values."""
        for name, values in analysis.plan.items():
            model.get_parameter(name).copy_(values)
        return model

    def training_rule(self, model: nn.Module) -> TrainingRule:
        """Return what keeps zeros zero."""
        return KeepZeros(model)

    def _refuse_large(self, weights: Sequence[LayerWeight]) -> None:
        size = sum(p.numel() for w in weights for p in w.layer.parameters(recurse=False))
        if size > self.config.max_weights:
            raise StageError(
                f"the target layers have {size:,} weights and biases, so the Hessian would have {size**2:,} entries; "
                f"`max_weights` is {self.config.max_weights:,}. Use 'pruning/obs', which works layer by layer, take "
                "fewer `targets`, or raise the limit"
            )

    def _gradients(self, model: nn.Module, weights: Sequence[LayerWeight], task: Task) -> torch.Tensor:
        batches = task.calibration(self.config.batch_size, self.config.batches)
        return gradients(model, _names(weights), track(batches, "gradients of the outputs", self.config.batches))

    @torch.no_grad()
    def _prune_(self, model: nn.Module, weights: Sequence[LayerWeight], have: int, zeros: int, task: Task) -> None:
        """Bring the number of zeros from `have` to `zeros` in place."""
        names = _names(weights)
        parameters = [model.get_parameter(name) for name in names]
        for turn in range(1, self.config.rounds + 1):
            vectors = self._gradients(model, weights, task)
            inverse = recursive_inverse(vectors, self.config.damping * float(vectors.square().mean()))
            values = torch.cat([p.flatten() for p in parameters]).to(inverse)
            steps = have + (zeros - have) * turn // self.config.rounds
            with Progress("removing weights", steps) as progress:
                fixed = _fixed(names, parameters, values.square() / inverse.diagonal())
                found = eliminate(values[None], inverse[None], steps, fixed, progress)
            for parameter, part in zip(parameters, found.weight[0].split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(part.view_as(parameter))


def gradients(model: nn.Module, names: Sequence[str], batches: Iterable[tuple[Any, ...]]) -> torch.Tensor:
    """Return the gradients of every output value in the named parameters, `(values of all batches, n)`, in evaluation.

    Raises `StageError` when the outputs are not finite, or there are no batches.
    """
    rows = []
    values = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    with evaluation(model), torch.enable_grad():
        for batch in batches:
            outputs = tree_leaves(functional_call(model, values, move(batch, device_of(model))))
            flat = torch.cat([leaf.flatten() for leaf in outputs if leaf.is_floating_point()])
            rows += [_gradients(flat, units, list(values.values())) for units in _units(flat)]
    if not rows:
        raise StageError("the task's calibration gives no batches, and the Hessian is measured on data")
    stacked = torch.cat(rows).to(torch.float64)
    if not torch.isfinite(stacked).all():
        raise StageError("the outputs or their gradients are NaN or infinite; check the data and the model")
    return stacked


def _units(outputs: torch.Tensor) -> Iterable[torch.Tensor]:
    """Yield the rows of the identity, some at a time: each picks one output value."""
    for some in torch.arange(len(outputs), device=outputs.device).split(_AT_ONCE):
        yield nn.functional.one_hot(some, len(outputs)).to(outputs)


def _gradients(outputs: torch.Tensor, units: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the gradients of the picked output values, `(units, n)`."""
    if not outputs.requires_grad:
        return units.new_zeros(len(units), sum(value.numel() for value in values))
    found = torch.autograd.grad(outputs, values, units, retain_graph=True, is_grads_batched=True, allow_unused=True)
    zeros = (value.new_zeros(len(units), *value.shape) for value in values)
    return torch.cat([(z if part is None else part).flatten(1) for part, z in zip(found, zeros, strict=True)], 1)


def recursive_inverse(gradients: torch.Tensor, alpha: float, at_once: int = 64) -> torch.Tensor:
    """Return the inverse of H = alpha I + 1/P sum X X^T, the X being the rows of `gradients`, `(P, n)`.

    H^-1 <- H^-1 - H^-1 X X^T H^-1 / (P + X^T H^-1 X), from I / alpha on (Hassibi & Stork 1992, eq. 13); some X are
    taken `at_once`, with X their matrix and P I in place of P, which gives the same.
    """
    count, n = gradients.shape
    inverse = torch.eye(n, dtype=gradients.dtype, device=gradients.device) / alpha
    for x in gradients.split(at_once):
        moved = inverse @ x.T
        inner = x @ moved
        inner.diagonal().add_(count)
        inverse -= moved @ torch.linalg.solve(inner, moved.T)
    return inverse


def _names(weights: Sequence[LayerWeight]) -> list[str]:
    """Return the names of weights and biases, which are the variables in this order."""
    return [
        f"{w.name}.{kind}" for w in weights for kind in ("weight", "bias") if w.layer._parameters.get(kind) is not None
    ]


def _fixed(names: Sequence[str], parameters: Sequence[nn.Parameter], saliency: torch.Tensor) -> torch.Tensor:
    """Return the mask of what is never removed: biases, and of each layer the weight that costs most."""
    masks = []
    for name, cost in zip(names, saliency.split([p.numel() for p in parameters]), strict=True):
        kept = torch.full_like(cost, name.endswith(".bias"), dtype=torch.bool)
        kept[cost.argmax()] = True
        masks.append(kept)
    return torch.cat(masks)


def _count(weights: Sequence[LayerWeight]) -> tuple[int, int]:
    """Return the number of weights and of zeros among them."""
    return sum(w.parameter.numel() for w in weights), sum(int((w.parameter == 0).sum()) for w in weights)


def _skip(weight: LayerWeight, reason: str) -> SkippedLayer:
    return SkippedLayer(name=weight.name, kind=weight.kind, reason=reason)


def _report(weight: LayerWeight, after: torch.Tensor) -> LayerReport:
    total, before, kept = after.numel(), int(weight.parameter.count_nonzero()), int(after.count_nonzero())
    return LayerReport(
        name=weight.name,
        kind=weight.kind,
        action=f"keep {kept:,} of {before:,} weights ({kept / total:.1%}) and correct them",
        scores={"sparsity": 1 - kept / total, "parameters_after": kept},
    )
