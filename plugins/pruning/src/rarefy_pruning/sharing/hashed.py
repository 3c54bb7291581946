"""HashedNets: weights share values by a hash."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from rarefy.seeds import derive
from rarefy.task import Task
from rarefy.technique import Analysis, Technique, refuse_not_finite, replace_, select
from rarefy.weights import per_layer
from rarefy_schemas import LayerReport, SkippedLayer
from torch import nn

from rarefy_pruning.sharing.config import HashedConfig
from rarefy_pruning.sharing.layers import HashedConv2d, HashedLayer, HashedLinear


@dataclass(frozen=True)
class _Choice:
    """What is done to one layer: how many values it gets, or why it is left alone."""

    name: str
    layer: nn.Linear | nn.Conv2d
    buckets: int
    reason: str | None


class Hashed(Technique[HashedConfig]):
    """Replaces each target layer by one that stores a share of the values; every layer hashes by a seed of its own.

    Only storage shrinks: the full weight is looked up for each forward pass and multiplied as before.
    """

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Say how many values each layer will store and how far the nearest ones are from its weights."""
        layers, skipped, plan = [], [], []
        for choice in self._choices(model):
            kind = type(choice.layer).__name__
            if choice.reason is not None:
                skipped.append(SkippedLayer(name=choice.name, kind=kind, reason=choice.reason))
                continue
            refuse_not_finite(choice.name, choice.layer.weight)
            plan.append(choice.name)
            layers.append(LayerReport(name=choice.name, kind=kind, action=_action(choice), scores=self._scores(choice)))
        return Analysis(tuple(layers), tuple(skipped), tuple(plan))

    def transform(self, model: nn.Module, analysis: Analysis, task: Task) -> nn.Module:
        """Put the hashed layers in place."""
        for choice in self._choices(model):
            if choice.name in analysis.plan:
                self._replace(model, choice)
        return model

    def predict(self, model: nn.Module) -> nn.Module:
        """Return the model with hashed layers, whose sizes depend on shapes alone."""
        model = copy.deepcopy(model)
        for choice in self._choices(model):
            if choice.reason is None:
                replace_(model, choice.layer, self._empty(choice))
        return model

    def _choices(self, model: nn.Module) -> list[_Choice]:
        targets = list(select(model, self.config))
        rates = per_layer([name for name, _ in targets], self.config.per_layer, self.config.compression)
        owners = _owners(model)
        choices = []
        for name, layer in targets:
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            weights = math.prod(layer.weight.shape)
            buckets = max(1, round(weights / rates[name]))
            choices.append(_Choice(name, layer, buckets, _why_not(layer, buckets, owners)))
        return choices

    def _replace(self, model: nn.Module, choice: _Choice) -> None:
        old, new = choice.layer, self._empty(choice)
        if self.config.init == "projection":
            new.project_(old.weight)
            new.bias = old.bias
        else:
            generator = torch.Generator(old.weight.device).manual_seed(derive(self.seed, choice.name, "values"))
            new.reset_parameters(generator)
            if new.bias is not None and old.bias is not None:
                new.bias.requires_grad_(old.bias.requires_grad)
        new.values.requires_grad_(old.weight.requires_grad)
        replace_(model, old, new.train(old.training))

    def _empty(self, choice: _Choice) -> HashedLayer:
        layer, seed = choice.layer, derive(self.seed, choice.name)
        place = {"bias": layer.bias is not None, "device": layer.weight.device, "dtype": layer.weight.dtype}
        with torch.random.fork_rng(devices=[]):
            if isinstance(layer, nn.Linear):
                return HashedLinear(layer.in_features, layer.out_features, choice.buckets, seed, **place)
            return HashedConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, choice.buckets, seed, layer.stride,
                layer.padding, layer.dilation, layer.groups, padding_mode=layer.padding_mode, **place,
            )  # fmt: skip

    def _scores(self, choice: _Choice) -> dict[str, float]:
        made, weight = self._empty(choice), choice.layer.weight
        bias = choice.layer.bias.numel() if choice.layer.bias is not None else 0
        used = torch.unique(made.lookup() % made.buckets).numel()
        scores = {
            "parameters_before": weight.numel() + bias,
            "parameters_after": choice.buckets + bias,
            "unused_values": choice.buckets - used,
        }
        return scores | ({"relative_error": made.project_(weight)} if self.config.init == "projection" else {})


def _action(choice: _Choice) -> str:
    weights = choice.layer.weight.numel()
    return f"{choice.buckets:,} stored values for {weights:,} weights; FLOPs and time stay as they are"


def _owners(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """Return the modules that hold each parameter."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return owners


def _why_not(layer: nn.Linear | nn.Conv2d, buckets: int, owners: dict[nn.Parameter, set[nn.Module]]) -> str | None:
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other tensors; make it a plain parameter first"
    if layer.weight.numel() == 0:
        return "it has no weights"
    if len(owners[layer.weight]) > 1:
        others = ", ".join(sorted(type(o).__name__ for o in owners[layer.weight] if o is not layer))
        return f"its weight is also that of another layer ({others}), so hashing it would store more, not less"
    if buckets >= layer.weight.numel():
        return f"{buckets} stored values for its {layer.weight.numel()} weights would save nothing"
    return None
