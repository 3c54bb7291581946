"""Options of sharing and merging."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import TechniqueConfig, Traits


class HashedConfig(TechniqueConfig):
    """Let a hash choose which weights of a layer share one stored value: a smaller file, the same FLOPs and time."""

    implementation: ClassVar[str] = "rarefy_pruning.sharing.hashed:Hashed"
    paper: ClassVar[str] = "Chen et al. 2015, Compressing neural networks with the hashing trick"
    traits: ClassVar[Traits] = Traits(
        start="either",
        layers=("Linear", "Conv2d"),
        changes_shapes=True,
        keeps_zeros=False,
        needs_dense_floats=True,
    )

    technique: Literal["pruning/hashed"] = "pruning/hashed"
    compression: float = Field(default=8.0, gt=1)
    """Weights per stored value; biases are stored as they are."""
    per_layer: dict[str, Annotated[float, Field(gt=1)]] = {}
    """Compression of single layers by name pattern (`features.*: 4`); the first pattern that matches counts."""
    init: Literal["fresh", "projection"] = "fresh"
    """Start anew, or nearest to the trained weights, which pays below 4 weights per value; either needs training."""


class DataFreeConfig(TechniqueConfig):
    """Merge neurons or channels that do nearly the same, without any data."""

    implementation: ClassVar[str] = "rarefy_pruning.sharing.data_free:DataFree"
    paper: ClassVar[str] = "Srinivas & Babu 2015, Data-free parameter pruning for deep neural networks"
    traits: ClassVar[Traits] = Traits(changes_shapes=True, keeps_zeros=False, needs_dense_floats=True)

    technique: Literal["pruning/data-free"] = "pruning/data-free"
    amount: float | None = Field(default=None, gt=0, lt=1)
    """Share of each layer's neurons to merge away, of which one stays; when absent, `cutoff` decides."""
    per_layer: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Shares of single layers by name pattern (`features.*: 0.6`); the first pattern that matches counts."""
    cutoff: float | None = Field(default=None, gt=0, lt=1)
    """Merge until the next merge costs more than this share of all pairs did at first; 0.1 when absent."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.amount is not None and self.cutoff is not None:
            raise ValueError("`amount` and `cutoff` both say how many neurons go; leave one out")
        return self
