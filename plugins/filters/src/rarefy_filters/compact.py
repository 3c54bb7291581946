"""What all compact blocks have in common: they stand in for a convolution where that makes it smaller and lighter."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from rarefy.technique import LayerTechnique, Plan, Skip, replace_, select
from rarefy_schemas import TechniqueConfig
from torch import nn

ConfigT = TypeVar("ConfigT", bound=TechniqueConfig)


class CompactBlock(LayerTechnique[ConfigT]):
    """Replaces each target convolution; write `why_not`, `build` and `fill_`."""

    def why_not(self, layer: nn.Conv2d) -> str | None:
        """Return why this convolution is left alone, or None."""
        raise NotImplementedError

    def build(self, layer: nn.Conv2d) -> nn.Module:
        """Return the block for a convolution, its weights still to be set, on the layer's device."""
        raise NotImplementedError

    def fill_(self, block: Any, layer: nn.Conv2d) -> float:
        """Set the block's weights from the trained kernel and return the relative error of the kernel it stands for."""
        raise NotImplementedError

    def plan(self, name: str, layer: nn.Module) -> Plan | Skip:
        """Build the block where it pays."""
        assert isinstance(layer, nn.Conv2d)
        reason = self.why_not(layer)
        if reason is not None:
            return Skip(reason)
        block = self.build(layer)
        before, after = (sum(p.numel() for p in module.parameters()) for module in (layer, block))
        scores = {"relative_error": self.fill_(block, layer), "parameters_before": before, "parameters_after": after}
        return Plan(f"{after:,} parameters in place of {before:,}", scores)

    def apply(self, layer: nn.Module, plan: Plan) -> nn.Module:
        """Return the block, its weights from the kernel."""
        assert isinstance(layer, nn.Conv2d)
        block = self.build(layer)
        self.fill_(block, layer)
        return block

    def predict(self, model: nn.Module) -> nn.Module:
        """Return the model with blocks in place, which depend on shapes alone."""
        model = copy.deepcopy(model)
        for _, layer in list(select(model, self.config)):
            if isinstance(layer, nn.Conv2d) and self.why_not(layer) is None:
                replace_(model, layer, self.build(layer))
        return model


def conv(layer: nn.Conv2d, *arguments: Any, **options: Any) -> nn.Conv2d:
    """Return an uninitialised convolution on the device and of the type of `layer`."""
    made: nn.Conv2d = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d, *arguments, device=layer.weight.device, dtype=layer.weight.dtype, **options
    )
    return made
