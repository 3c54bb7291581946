"""Options of the techniques that train structures to die."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import Finetune, TechniqueConfig, Traits

Method = Literal["proximal", "penalty"]


def refuse_other_weights(finetune: Finetune | None) -> None:
    """Raise `ValueError` when the weights kept may be those of an epoch before the structures died."""
    if finetune is not None and (finetune.keep == "best" or finetune.patience):
        raise ValueError(
            "structures die in the course of the whole fine-tuning, and its best epoch may be one before that: leave "
            "out `patience` and use `keep: last`"
        )


class GroupLasso(TechniqueConfig):
    """Options of every technique that adds `strength * sum_g w_g ||theta_g||_2` to the loss, norms not squared."""

    strength: float = Field(gt=0)
    """Factor of the penalty. A structure to which the loss is indifferent shrinks by this times the sum of the learning
    rates (with sgd over `1 - momentum`), in root mean square when `weighted`. Proximal steps under Adam are relative to
    its steps of about `lr` per weight, so 0.1 to 0.5 is usual there; sgd is the finer tool."""
    method: Method = "proximal"
    """`proximal` shrinks after each optimizer step and makes exact zeros; `penalty` adds to the loss."""
    weighted: bool = True
    """Multiply each norm by the square root of the number of its weights, so that large structures are not spared."""
    threshold: float | None = Field(default=None, gt=0)
    """Root mean square of a structure under which `penalty` takes it for dead in the end; 0.001 when absent."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.finetune is None or self.finetune.epochs == 0:
            raise ValueError("structures die during fine-tuning: give `finetune` with at least one epoch")
        if self.threshold is not None and self.method == "proximal":
            raise ValueError("`threshold` belongs to `method: penalty`; proximal steps make exact zeros by themselves")
        refuse_other_weights(self.finetune)
        return self


class GroupLassoConfig(GroupLasso):
    """Train units, filters, input channels or whole layers to die under a group lasso, and cut what did."""

    implementation: ClassVar[str] = "rarefy_pruning.sparsity.lasso:CuttingLasso"
    paper: ClassVar[str] = (
        "Wen et al. 2016, Learning structured sparsity in deep neural networks; Zhou et al. 2016, Less is more"
    )
    traits: ClassVar[Traits] = Traits(changes_shapes=True, needs_dense_floats=True, start="either")

    technique: Literal["pruning/group-lasso"] = "pruning/group-lasso"
    structure: Literal["unit", "filter", "channel", "depth"] = "unit"
    """`unit`: all slices that depend on a channel, so that coupled layers die together; `filter`: the weights and the
    bias of one output of one layer; `channel`: the weights that read one channel in one layer; `depth`: the whole
    weight of a layer that a shortcut passes, after whose death what it alone has read is cut down to one channel."""


class KernelLassoConfig(GroupLasso):
    """Train columns of kernels, a channel and position over all filters, to die under a group lasso; leave zeros."""

    implementation: ClassVar[str] = "rarefy_pruning.sparsity.lasso:ZeroingLasso"
    paper: ClassVar[str] = (
        "Lebedev & Lempitsky 2016, Fast convnets using group-wise brain damage; Wen et al. 2016, Learning structured "
        "sparsity in deep neural networks"
    )
    traits: ClassVar[Traits] = Traits(makes_zeros=True, needs_dense_floats=True, start="either")

    structure: ClassVar[str] = "shape"

    technique: Literal["pruning/kernel-lasso"] = "pruning/kernel-lasso"


class NetworkSlimmingConfig(TechniqueConfig):
    """Train the scales of batch norms towards zero, and cut the channels whose scales are smallest."""

    implementation: ClassVar[str] = "rarefy_pruning.sparsity.slimming:NetworkSlimming"
    paper: ClassVar[str] = "Liu et al. 2017, Learning efficient convolutional networks through network slimming"
    traits: ClassVar[Traits] = Traits(
        layers=("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
        changes_shapes=True,
        needs_dense_floats=True,
        start="either",
    )

    technique: Literal["pruning/network-slimming"] = "pruning/network-slimming"
    amount: float = Field(gt=0, lt=1)
    """Share of the channels of all treated groups that is cut, at least one staying in each."""
    strength: float | None = Field(default=None, gt=0)
    """Factor of the sum of |scale| during fine-tuning; absent, without `finetune`, for a model trained so before."""
    method: Method = "proximal"
    """`proximal` soft-thresholds the scales after each optimizer step; `penalty` adds to the loss, as in the paper."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        trains = self.finetune is not None and self.finetune.epochs > 0
        if trains != (self.strength is not None):
            raise ValueError(
                "`strength` and `finetune` belong together: give both to train the scales, or neither to cut by the "
                "scales there are; to fine-tune after the cut, add a step"
            )
        refuse_other_weights(self.finetune)
        return self
