"""Options of the techniques that remove single weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import TechniqueConfig, Traits


class WeightPruning(TechniqueConfig):
    """Options of every technique that removes single weights; biases are never pruned."""

    traits: ClassVar[Traits] = Traits(makes_zeros=True, keeps_zeros=True, needs_dense_floats=True)

    amount: float | None = Field(default=None, gt=0, lt=1)
    """Share of the weights that are zero afterwards; when absent, only the layers in `per_layer` are pruned."""
    per_layer: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Shares of single layers by name pattern (`features.*: 0.6`); the first pattern that matches counts."""
    scope: Literal["global", "layer"] = "global"
    """Whether `amount` is the share of all target layers together, or of each one; a layer keeps at least a weight."""
    schedule: Literal["one-shot", "cubic"] = "one-shot"
    """Prune before fine-tuning, or gradually while it runs."""
    ramp: float | None = Field(default=None, gt=0, le=1)
    """Share of the fine-tuning over which a cubic schedule prunes; 0.75 when absent."""
    updates: int | None = Field(default=None, ge=1)
    """Number of times a cubic schedule prunes; 50 when absent."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.amount is None and not self.per_layer:
            raise ValueError("give `amount`, the share of weights to remove, or `per_layer`")
        gradual = self.schedule == "cubic"
        if gradual and (self.finetune is None or self.finetune.epochs == 0):
            raise ValueError("`schedule: cubic` prunes during fine-tuning: give `finetune`, or use `one-shot`")
        if gradual and self.finetune is not None and (self.finetune.keep == "best" or self.finetune.patience):
            raise ValueError(
                "`schedule: cubic` needs the whole fine-tuning, as its best epoch may be one before the pruning: "
                "leave out `patience` and use `keep: last`"
            )
        if not gradual and (self.ramp is not None or self.updates is not None):
            raise ValueError("`ramp` and `updates` belong to `schedule: cubic`; leave them out or set that")
        return self


class MagnitudeConfig(WeightPruning):
    """Remove the weights of smallest magnitude, at once or gradually."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.magnitude:Magnitude"
    paper: ClassVar[str] = (
        "Han et al. 2015, Learning both weights and connections; Zhu & Gupta 2017, To prune, or not to prune"
    )

    technique: Literal["pruning/magnitude"] = "pruning/magnitude"
