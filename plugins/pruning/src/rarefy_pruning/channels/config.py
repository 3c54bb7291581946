"""Options of the techniques that remove whole channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import DataNeed, TechniqueConfig, Traits
from rarefy_schemas.base import Schema

Share = Annotated[float, Field(gt=0, lt=1)]
Normalize = Literal["mean", "saving", "none"]


class Target(Schema):
    """What has to be left of a measure."""

    measure: Literal["flops", "parameters", "bytes", "latency"] = "flops"
    """`flops` of a forward pass, number of `parameters`, `bytes` of parameters and buffers before any coding, or
    `latency`, the time of a forward pass on this machine."""
    share: float = Field(gt=0, lt=1)
    """Share of the measure that is left, 0.5 for half."""
    batch_size: int = Field(default=1, ge=1)
    """Samples per forward pass."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU that `latency` is measured with; torch's own number when absent."""
    table: str | None = None
    """A JSON file to keep the times of single layers in, for later runs on this machine."""


class ChannelPruning(TechniqueConfig):
    """Options of every technique that removes channels, heads or neurons with all that depends on them."""

    traits: ClassVar[Traits] = Traits(changes_shapes=True, needs_dense_floats=True)

    amount: Share | None = None
    """Share of the units that is removed; give this or `target`, or `per_layer` alone."""
    target: Target | None = None
    """Removes as many units as it takes to get there."""
    per_layer: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    """Shares of single groups by name pattern (`stage1.*: 0.3`, 0 to leave them whole); the first match counts."""
    scope: Literal["layer", "global", "alike", "sensitivity"] = "layer"
    """The same share in each group; the lowest scores of all groups together; of groups of like structure together
    (isomorphic pruning); or by `sensitivity`, where the loss rises least for what is saved: it is measured with the
    lowest-scored 25, 50 and 75 % of each group masked, on the validation split, and without labels by how far the
    outputs move."""
    sensitivity_batches: int = Field(default=4, ge=1)
    """Batches that `scope: sensitivity` measures on."""
    normalize: Normalize = "mean"
    """What scores are divided by before groups are compared: their group's `mean`, or what a unit of the group saves
    of the `target`, one unit where there is none. The second is for scores that are increases of the loss."""
    least: float = Field(default=0.1, ge=0, lt=1)
    """Share of each group that stays in any case; at least one unit always does."""
    round_to: int = Field(default=8, ge=1)
    """Widths are rounded up to a multiple of this in groups of at least sixteen times as many units. Measured on one
    thread of a Xeon (benchmarks/results/widths.json), layers of 113 to 512 channels take 1 % less time so, although
    they are wider; narrower ones 5 % more, so they are left as they come out."""
    blocks: Literal["whole", "inside"] = "whole"
    """Where heads or convolution groups can go whole or lose equal places inside each: which of the two."""
    statistics: bool = True
    """Whether groups are cut over which a mean, a variance or a scale is taken, as the width of a transformer."""
    reconstruct: bool = False
    """Whether the layers that lose inputs are fitted to the outputs that they had, by least squares on unlabelled data
    (He et al. 2017, ThiNet): most of the accuracy is there again before any fine-tuning, which then wants a learning
    rate low enough to keep it."""
    reconstruct_batches: int = Field(default=16, ge=1)
    """Calibration batches that `reconstruct` looks at, once for each layer that lost inputs; fewer are faster."""
    rounds: int = Field(default=1, ge=1)
    """Number of times the step is done, each followed by its fine-tuning; together they remove what is asked for."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if self.amount is not None and self.target is not None:
            raise ValueError("`amount` and `target` both say how much is removed; give one")
        if self.amount is None and self.target is None and not self.per_layer:
            raise ValueError("give `amount`, the share of units to remove, `target`, what to reach, or `per_layer`")
        if self.rounds > 1 and self.finetune is None:
            raise ValueError("`rounds` fine-tunes between cuts: give `finetune`, or leave it at 1")
        return self

    def needed_data(self) -> DataNeed:
        """Return what the criterion needs, and more where other options look at data."""
        own = super().needed_data()
        return "unlabelled" if own == "none" and (self.reconstruct or self.scope == "sensitivity") else own

    def parts(self) -> Sequence[TechniqueConfig]:
        """Return one step per round; what is left after each is the same share of what was there."""
        if self.rounds == 1:
            return [self]

        def root(share: float) -> float:
            return float(share ** (1 / self.rounds))

        once = {
            "rounds": 1,
            "amount": None if self.amount is None else 1 - root(1 - self.amount),
            "per_layer": {name: 1 - root(1 - share) for name, share in self.per_layer.items()},
            "target": self.target and self.target.model_copy(update={"share": root(self.target.share)}),
        }
        name = self.name or self.registered_name()
        return [
            self.model_copy(update={**once, "name": f"{name} ({i + 1} of {self.rounds})"}) for i in range(self.rounds)
        ]


class SampledChannelPruning(ChannelPruning):
    """Options of the criteria by gradients."""

    traits: ClassVar[Traits] = Traits(data="labelled", changes_shapes=True, needs_dense_floats=True)

    samples: int = Field(default=128, ge=1)
    """Samples of the training split whose gradients are taken one by one."""


class ChannelL1Config(ChannelPruning):
    """Remove the channels whose filters have the smallest sum of magnitudes."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.weights:L1"
    paper: ClassVar[str] = "Li et al. 2017, Pruning filters for efficient convnets"
    technique: Literal["pruning/channel-l1"] = "pruning/channel-l1"


class ChannelL2Config(ChannelPruning):
    """Remove the channels whose filters have the smallest Euclidean norm."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.weights:L2"
    paper: ClassVar[str] = "He et al. 2018, Soft filter pruning"
    technique: Literal["pruning/channel-l2"] = "pruning/channel-l2"


class ChannelGeometricMedianConfig(ChannelPruning):
    """Remove the channels whose filters are nearest to all others, as the others can stand in for them."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.weights:GeometricMedian"
    paper: ClassVar[str] = "He et al. 2019, Filter pruning via geometric median"
    technique: Literal["pruning/channel-geometric-median"] = "pruning/channel-geometric-median"


class ChannelBatchNormConfig(ChannelPruning):
    """Remove the channels with the smallest batch normalization scales."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.weights:BatchNormScale"
    paper: ClassVar[str] = "Liu et al. 2017, Learning efficient convolutional networks through network slimming"
    technique: Literal["pruning/channel-batch-norm"] = "pruning/channel-batch-norm"


class ChannelRandomConfig(ChannelPruning):
    """Remove channels at random, the baseline of every criterion."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.weights:Random"
    paper: ClassVar[str] = "Mittal et al. 2018, Recovering from random pruning"
    technique: Literal["pruning/channel-random"] = "pruning/channel-random"


class ChannelTaylorConfig(SampledChannelPruning):
    """Remove the channels whose removal changes the losses of single samples least, to first order."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.gates:Taylor"
    paper: ClassVar[str] = (
        "Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient inference"
    )
    technique: Literal["pruning/channel-taylor"] = "pruning/channel-taylor"


class ChannelFisherConfig(SampledChannelPruning):
    """Remove the channels whose removal changes the loss least, to second order by the Fisher information."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.gates:Fisher"
    paper: ClassVar[str] = "Theis et al. 2018, Faster gaze prediction; Liu et al. 2021, Group Fisher pruning"
    technique: Literal["pruning/channel-fisher"] = "pruning/channel-fisher"
    normalize: Normalize = "saving"
    """What scores are divided by before groups are compared: what a unit of the group saves of the `target`, one unit
    where there is none, so that a budget is reached at the least increase of the loss; or their group's `mean`."""


class ChannelActivationConfig(ChannelPruning):
    """Remove the channels that the next layers see least of."""

    implementation: ClassVar[str] = "rarefy_pruning.channels.activations:Activation"
    paper: ClassVar[str] = (
        "Hu et al. 2016, Network trimming; Polyak & Wolf 2015, Channel-level acceleration of deep face representations"
    )
    traits: ClassVar[Traits] = Traits(data="unlabelled", changes_shapes=True, needs_dense_floats=True)
    technique: Literal["pruning/channel-activation"] = "pruning/channel-activation"
    batches: int = Field(default=8, ge=1)
    """Batches of the training split that are looked at."""
    statistic: Literal["mean", "nonzero", "deviation"] = "mean"
    """`mean` of |activation|; `nonzero`, the share of activations that are not zero (one minus APoZ); or the standard
    `deviation` over samples and positions."""
