"""Options of the quantization techniques."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from rarefy_schemas import TechniqueConfig, Traits

Bits = Annotated[int, Field(ge=1, le=8)]


class WeightSharing(TechniqueConfig):
    """Options of every technique that gives the weights of a layer a common codebook."""

    traits: ClassVar[Traits] = Traits(leaves_codes=True, keeps_zeros=True, needs_dense_floats=True)

    bits: Bits = 5
    """Bits per code: a layer takes at most 2^bits distinct values; zero, where it occurs, is one of them and stays."""
    per_layer: dict[str, Bits] = {}
    """Bits of single layers by name pattern (`features.*: 8`); the first pattern that matches counts."""
    biases: bool = False
    """Whether biases get a codebook too."""


class KMeansConfig(WeightSharing):
    """Share weights: k-means over the weights of each layer, then fine-tuning of the centroids."""

    implementation: ClassVar[str] = "rarefy_quantization.kmeans:KMeans"
    paper: ClassVar[str] = (
        "Han, Mao & Dally 2016, Deep Compression; Gong et al. 2014, Compressing deep convolutional networks"
    )

    technique: Literal["quantization/kmeans"] = "quantization/kmeans"
    init: Literal["linear", "density", "random"] = "linear"
    """First centroids: evenly from the least to the greatest weight, at even quantiles, or random weights."""
    rounds: int = Field(default=10_000, ge=1)
    """Most iterations per layer; it stops earlier when no weight changes its centroid."""
