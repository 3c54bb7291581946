"""Linear layers of other classes than torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from rarefy.preparation.config import LinearLayersConfig
from rarefy.task import Task
from rarefy.technique import Analysis, LayerTechnique, Plan, Skip, is_torch, replace_, select
from rarefy.weights import holders

_TRIALS = ((3,), (2, 3))
"""Leading sizes of the inputs that layers are tried on."""
_ROUNDING = 1e-10
"""Largest relative difference of outputs in double precision."""


class LinearLayers(LayerTechnique[LinearLayersConfig]):
    """Replaces each layer whose outputs are those of a `torch.nn.Linear` with its weight, as it is or transposed."""

    def analyze(self, model: nn.Module, task: Task) -> Analysis:
        """Try every layer of a class that is not torch's."""
        self.shared = _shared(model)
        return super().analyze(model, task)

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        """Tell whether there is such a linear layer, and if not, why."""
        if is_torch(type(layer)):
            return Skip("its class is torch's own")
        if not self.shared.isdisjoint(layer.parameters()):
            return Skip("it shares its weight with another layer")
        linear = as_linear(layer)
        if linear is None:
            return Skip("its outputs are not those of a linear layer with its weight and bias")
        return Plan(f"Linear of {linear.in_features:,} inputs and {linear.out_features:,} outputs")

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        """Return the linear layer."""
        linear = as_linear(layer)
        assert linear is not None  # as it was when planned
        return linear

    def predict(self, model: nn.Module) -> nn.Module:
        """Return the model with the layers replaced whose outputs have the shape."""
        model = copy.deepcopy(model)
        self.shared = _shared(model)
        for name, layer in list(select(model, self.config)):
            plan = self.plan(name, layer)
            if isinstance(plan, Plan):
                replace_(model, layer, self.apply(layer, plan))
        return model


@torch.no_grad()
def as_linear(layer: nn.Module) -> nn.Linear | None:
    """Return the `torch.nn.Linear` that computes what a layer does, with a weight and a bias of its own, or None.

    The layer is tried on random inputs in both modes; one without values (meta device), for shapes alone.
    """
    if len(list(layer.modules())) > 1 or list(layer.buffers()) or _hooked(layer):
        return None
    parameters = dict(layer.named_parameters())
    weight, bias = parameters.pop("weight", None), parameters.pop("bias", None)
    if weight is None or weight.dim() != 2 or not weight.numel() or parameters:
        return None
    return next((linear for linear in _candidates(weight, bias) if _alike(layer, linear)), None)


def _candidates(weight: nn.Parameter, bias: nn.Parameter | None) -> Iterator[nn.Linear]:
    for rows in (weight, weight.T):
        outputs, inputs = rows.shape
        if bias is None or bias.shape == (outputs,):
            with torch.device("meta"):
                linear = nn.Linear(inputs, outputs, bias is not None)
            linear.weight = nn.Parameter(rows.detach().clone(memory_format=torch.contiguous_format))
            linear.weight.requires_grad_(weight.requires_grad)
            if bias is not None:
                linear.bias = bias
            yield linear


def _alike(layer: nn.Module, linear: nn.Linear) -> bool:
    """Tell whether copies of both in double precision give the same in both modes; without values, the same shapes."""
    layer, linear = copy.deepcopy(layer).double(), copy.deepcopy(linear).double()
    draw = torch.Generator().manual_seed(0)
    try:
        for sizes in _TRIALS:
            x = torch.randn(*sizes, linear.in_features, generator=draw).to(linear.weight)
            wanted = linear(x)
            for training in (False, True):
                found = layer.train(training)(x)
                if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
                    return False
                if not wanted.is_meta and (found - wanted).norm() > _ROUNDING * wanted.norm():
                    return False
    except Exception:  # a layer of another kind may raise anything
        return False
    return True


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def _shared(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if len(holders(model, parameter)) > 1}
