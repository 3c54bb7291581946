"""Options of recovery steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from rarefy_schemas import TechniqueConfig, Traits


class BatchNormConfig(TechniqueConfig):
    """Measure the means and variances of batch norms anew, on unlabelled data, after weights have changed.

    Rounding and pruning shift what a batch norm is given, and its statistics no longer fit. No weight changes, so it
    may follow any step; it is worth a try after every one that was not fine-tuned.
    """

    traits: ClassVar[Traits] = Traits(
        data="unlabelled", layers=("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
    )
    implementation: ClassVar[str] = "rarefy.recovery.batch_norm:BatchNormStatistics"
    paper: ClassVar[str] = "Li et al. 2020, EagleEye: fast sub-net evaluation for efficient neural network pruning"

    technique: Literal["recovery/batch-norm"] = "recovery/batch-norm"
    batches: int = Field(default=16, ge=1)
    """Number of batches whose statistics are averaged."""
    batch_size: int | None = Field(default=None, ge=2)
    """Samples per batch; the task's own number when absent."""
    relative: bool = True
    """Measure the original model, too, and take over what has changed: means by difference, variances by ratio. So few
    or unusual samples do little harm. Where the original has no batch norm of that name and width, as behind pruned
    channels, the statistics are those of the samples."""
