"""Options of the techniques that remove single weights."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from rarefy_schemas import TechniqueConfig, Traits

Share = Annotated[float, Field(gt=0, lt=1)]


class WeightPruning(TechniqueConfig):
    """Options of every technique that removes single weights; biases are never pruned."""

    traits: ClassVar[Traits] = Traits(makes_zeros=True, keeps_zeros=True, needs_dense_floats=True)

    amount: Share | None = None
    """Share of the weights that are zero afterwards; when absent, only the layers in `per_layer` are pruned."""
    per_layer: dict[str, Share] = {}
    """Shares of single layers by name pattern (`features.*: 0.6`); the first pattern that matches counts."""
    sensitivity: float | None = Field(default=None, gt=0)
    """Instead of `amount`: from each layer, the share of its weights with |w| < sensitivity * their standard deviation.

    Deviation and share are taken once, before anything is pruned, over the weights that are not zero (Han et al. 2015).
    """
    pattern: str | None = None
    """Instead of a share: `n:m`, at most n of each m consecutive input channels keep their weight, such as `2:4`.

    Torch has no kernel for such patterns on the CPU: there the file gets smaller and the network no faster.
    """
    scope: Literal["global", "layer", "row"] = "global"
    """Weights that compete for staying: those of all target layers, of each layer, or of each output of a layer.

    A share is one of all these weights together; a layer keeps at least one weight, a row too.
    """
    schedule: Literal["one-shot", "cubic", "iterative"] = "one-shot"
    """Prune before fine-tuning, gradually while it runs, or in rounds with retraining after each."""
    ramp: float | None = Field(default=None, gt=0, le=1)
    """Share of the fine-tuning over which a cubic schedule prunes; 0.75 when absent."""
    updates: int | None = Field(default=None, ge=1)
    """Number of times a cubic schedule prunes; 50 when absent."""
    rounds: int | None = Field(default=None, ge=2)
    """Number of rounds of an iterative schedule, equal parts of the fine-tuning; 4 when absent.

    Each prunes first, the same share of what is left, and then retrains; dropout that follows a pruned layer becomes
    weaker, by the square root of the share of connections that are left (Han et al. 2015, section 3.2).
    """

    @field_validator("pattern")
    @classmethod
    def _n_of_m(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            parts = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", pattern)
            if parts is None or int(parts[1]) >= int(parts[2]):
                raise ValueError(f"write n:m with 0 < n < m, such as 2:4 (two of four stay), not {pattern!r}")
        return pattern

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.pattern is not None:
            if self.amount is not None or self.sensitivity is not None or self.per_layer:
                raise ValueError(
                    "`pattern` says how many weights stay; leave out `amount`, `sensitivity` and `per_layer`"
                )
        elif self.amount is not None and self.sensitivity is not None:
            raise ValueError("`amount` and `sensitivity` both say how many weights go; leave one out")
        elif self.amount is None and self.sensitivity is None and not self.per_layer:
            raise ValueError(
                "give `amount`, the share of weights to remove, or `per_layer`, `sensitivity` or `pattern`"
            )
        return self

    @model_validator(mode="after")
    def _whole_schedule(self) -> Self:
        during = self.schedule != "one-shot"
        if during and (self.finetune is None or self.finetune.epochs == 0):
            raise ValueError(f"`schedule: {self.schedule}` works during fine-tuning: give `finetune`")
        gradual = self.schedule in ("cubic", "iterative")
        if gradual and self.finetune is not None and (self.finetune.keep == "best" or self.finetune.patience):
            raise ValueError(
                f"`schedule: {self.schedule}` needs the whole fine-tuning, as its best epoch may be one before the "
                "pruning: leave out `patience` and use `keep: last`"
            )
        if self.schedule != "cubic" and (self.ramp is not None or self.updates is not None):
            raise ValueError("`ramp` and `updates` belong to `schedule: cubic`; leave them out or set that")
        if self.schedule != "iterative" and self.rounds is not None:
            raise ValueError("`rounds` belongs to `schedule: iterative`; leave it out or set that")
        return self


class MeasuredPruning(WeightPruning):
    """Options of criteria that look at data; what they measure is measured anew whenever a schedule prunes."""

    batches: int = Field(default=8, ge=1)
    """Batches of the training split to measure on, always the same ones."""


class MagnitudeConfig(WeightPruning):
    """Remove the weights of smallest magnitude, at once, gradually or in rounds."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.magnitude:Magnitude"
    paper: ClassVar[str] = (
        "Han et al. 2015, Learning both weights and connections; Zhu & Gupta 2017, To prune, or not to prune"
    )

    technique: Literal["pruning/magnitude"] = "pruning/magnitude"


class WandaConfig(MeasuredPruning):
    """Remove the weights whose magnitude times the norm of their input is smallest among those of an output."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.wanda:Wanda"
    paper: ClassVar[str] = "Sun et al. 2024, A simple and effective pruning approach for large language models"
    traits: ClassVar[Traits] = WeightPruning.traits.model_copy(update={"data": "unlabelled"})

    technique: Literal["pruning/wanda"] = "pruning/wanda"
    scope: Literal["global", "layer", "row"] = "row"
    """Weights that compete for staying: those of all target layers, of each layer, or of each output (the paper's)."""


class SnipConfig(MeasuredPruning):
    """Remove the weights whose loss would change least, to first order; also before any training."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.snip:Snip"
    paper: ClassVar[str] = "Lee et al. 2019, SNIP: single-shot network pruning based on connection sensitivity"
    traits: ClassVar[Traits] = WeightPruning.traits.model_copy(update={"data": "labelled", "start": "either"})

    technique: Literal["pruning/snip"] = "pruning/snip"


class OptimalBrainDamageConfig(MeasuredPruning):
    """Remove the weights whose loss would change least by the diagonal of its Hessian; for networks at a minimum."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.brain_damage:OptimalBrainDamage"
    paper: ClassVar[str] = "LeCun et al. 1989, Optimal brain damage"
    traits: ClassVar[Traits] = WeightPruning.traits.model_copy(update={"data": "labelled"})

    technique: Literal["pruning/optimal-brain-damage"] = "pruning/optimal-brain-damage"
    probes: int = Field(default=100, ge=1)
    """Products with the Hessian per layer and batch.

    Second derivatives are exact where so many suffice: in linear layers with no more outputs, in others with no more
    weights. Elsewhere they are estimates without bias, the better the more probes.
    """


class MovementConfig(WeightPruning):
    """Remove the weights that fine-tuning moves towards zero; what is removed stays removed, unlike in the paper."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.movement:Movement"
    paper: ClassVar[str] = "Sanh et al. 2020, Movement pruning: adaptive sparsity by fine-tuning"

    technique: Literal["pruning/movement"] = "pruning/movement"
    scope: Literal["global", "layer", "row"] = "layer"
    """Weights that compete for staying: those of all target layers, of each layer (the paper's), or of each output."""
    schedule: Literal["cubic", "at-end"] = "cubic"
    """Prune gradually while the fine-tuning runs, or once when it has ended."""


class BiasedWeightDecayConfig(WeightPruning):
    """Train with a decay that spares large weights, and remove the smallest in the end."""

    implementation: ClassVar[str] = "rarefy_pruning.weights.biased_decay:BiasedWeightDecay"
    paper: ClassVar[str] = "Hanson & Pratt 1989, Comparing biases for minimal network construction"

    technique: Literal["pruning/biased-weight-decay"] = "pruning/biased-weight-decay"
    form: Literal["hyperbolic", "exponential"] = "hyperbolic"
    """Penalty of a weight: |w| / (1 + sharpness |w|), or 1 - exp(-sharpness |w|)."""
    strength: float = Field(default=1e-4, gt=0)
    """Factor of the penalties' sum in the loss."""
    sharpness: float = Field(default=10.0, gt=0)
    """The lambda of the penalty: weights far beyond its reciprocal are hardly decayed."""
    schedule: Literal["at-end", "cubic", "iterative"] = "at-end"
    """Prune once when the fine-tuning has ended, gradually while it runs, or in rounds."""
