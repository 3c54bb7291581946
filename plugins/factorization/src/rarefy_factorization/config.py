"""Options of factorization."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import TechniqueConfig, Traits


class RankConfig(TechniqueConfig):
    """How the rank of a layer is chosen; one of the four ways, half of the parameters when none is given."""

    traits: ClassVar[Traits] = Traits(
        layers=("Linear", "Conv1d", "Conv2d"), changes_shapes=True, keeps_zeros=False, needs_dense_floats=True
    )

    rank: int | None = Field(default=None, ge=1)
    """The rank itself, of each group of a grouped convolution; at most the layer's full rank is used."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the full rank."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Share of the sum of squared singular values to keep."""
    parameters: float | None = Field(default=None, gt=0, lt=1)
    """Largest share of the layer's weights that its factors may have together."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("rank", "fraction", "energy", "parameters") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{'` and `'.join(given)}` choose the rank in different ways; give one of them")
        return self


class SvdConfig(RankConfig):
    """Replace layers by two thinner ones, the truncated singular value decomposition."""

    implementation: ClassVar[str] = "rarefy_factorization.svd:Svd"
    paper: ClassVar[str] = (
        "Jaderberg et al. 2014, Speeding up convolutional neural networks with low rank expansions; "
        "Tai et al. 2016, Convolutional neural networks with low-rank regularization"
    )

    technique: Literal["factorization/svd"] = "factorization/svd"
    scheme: Literal["spatial", "channel"] = "spatial"
    """How a convolution falls apart: d x 1 then 1 x d, or d x d then 1 x 1 (always so in one dimension)."""
