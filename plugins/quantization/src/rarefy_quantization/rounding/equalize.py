"""Cross-layer equalization: channels whose weights have the same range where they are written and where read."""

from __future__ import annotations

import torch
from rarefy.dependencies import same_outputs
from rarefy.errors import StageError
from rarefy.folding import TOLERANCE, fold_batch_norms, outputs_of
from rarefy.task import Task
from rarefy.technique import Analysis, Technique
from rarefy.weights import layer_weights
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_quantization.rounding.config import EqualizeConfig
from rarefy_quantization.rounding.links import Link, Tensors, links, ranges

_SETTLED = 1e-3
"""Change of a factor below which it counts as settled."""


class Equalize(Technique[EqualizeConfig]):
    """Divides the rows that write channel i by s_i and multiplies what reads it, so that their ranges are the same.

    s_i = sqrt(r1_i / r2_i), with r1_i and r2_i the largest magnitudes that write and read it (Nagel et al. 2019, eq.
    11), pair by pair until nothing changes. With several layers on a side, as on a residual stream, r is the largest of
    them. The factor passes through activations with f(s x) = s f(x), s > 0, such as ReLU.
    """

    @torch.no_grad()
    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Find the pairs and the factors."""
        weights, skipped = layer_weights(model, self.config)
        kinds = {weight.name: weight.kind for weight in weights}
        folded, norms = self._folded(model, task)
        pairs, reasons = links(folded, task.example_inputs(), set(kinds))
        before = {name: parameter.detach().double() for name, parameter in folded.named_parameters()}
        after = balanced(pairs, before, self.config.rounds)
        beside = {
            name: [n for link in pairs if name in link.layers for n in link.layers if n != name] for name in kinds
        }
        layers = []
        for name, kind in kinds.items():
            reason = reasons.get(name, "its inputs are written and its channels read by no layer that is a target")
            if name in norms or beside[name]:
                rows = f"{name}.weight"
                scores = {"precision_before": _precision(before[rows]), "precision": _precision(after[rows])}
                action = _action(norms.get(name), beside[name], reason)
                layers.append(LayerReport(name=name, kind=kind, action=action, scores=scores))
            else:
                skipped.append(SkippedLayer(name=name, kind=kind, reason=reason))
        changed = {name: tensor for name, tensor in after.items() if tensor is not before[name]}
        return Analysis(tuple(layers), tuple(skipped), changed)

    @torch.no_grad()
    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Fold the batch norms and write the balanced weights; raise `StageError` when the outputs change."""
        inputs = task.example_inputs()
        wanted = outputs_of(model, inputs)
        model, _ = self._folded(model, task)
        for name, tensor in analysis.plan.items():
            model.get_parameter(name).copy_(tensor)
        if not same_outputs(outputs_of(model, inputs), wanted, TOLERANCE):
            raise StageError(
                "equalization changes the outputs on the example inputs by more than rounding does; the ranges of the "
                "channels may be too far apart for this precision. Equalize in float32, or exclude layers with "
                "`targets.exclude`"
            )
        return model

    def _folded(self, model: nn.Module, task: Task) -> tuple[nn.Module, dict[str, str]]:
        if not self.config.fold:
            return model, {}
        names = [weight.name for weight in layer_weights(model, self.config)[0]]
        return fold_batch_norms(model, task.example_inputs(), names)


def balanced(pairs: list[Link], tensors: Tensors, rounds: int) -> dict[str, torch.Tensor]:
    """Return the tensors after up to `rounds` passes over the pairs; channels of zeros on a side stay as they are."""
    result = dict(tensors)
    for _ in range(rounds):
        moved = 0.0
        for link in pairs:
            written, read = ranges(link.writers, result), ranges(link.readers, result)
            scales = torch.where((written > 0) & (read > 0), (written / read).sqrt(), 1.0)
            result.update(link.scaled(result, scales))
            moved = max(moved, float(scales.log().abs().max()))
        if moved < _SETTLED:
            break
    return result


def _action(norm: str | None, beside: list[str], reason: str) -> str:
    done = f"takes in {norm!r}" if norm else ""
    if not beside:
        return f"{done}; {reason}"
    others = list(dict.fromkeys(beside))
    named = ", ".join(map(repr, others)) if len(others) <= 3 else f"{others[0]!r} and {len(others) - 1} others"
    return ", ".join(part for part in (done, f"balanced with {named}") if part)


def _precision(weight: torch.Tensor) -> float:
    """Return the mean over the output channels of their range as a share of the layer's."""
    each = weight.abs().flatten(1).amax(1)
    return float((each / each.amax()).mean())
