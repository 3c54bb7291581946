"""Options of trellis-coded quantization."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from rarefy_schemas import TechniqueConfig, Traits

Rate = Annotated[float, Field(gt=0, le=8)]


class TrellisConfig(TechniqueConfig):
    """Round weights to one of two interleaved grids, in turns that the codes before decide: less error at equal bits.

    Fine-tuning trains the step of each layer; the codes stay. A file codes them to their entropy.
    """

    traits: ClassVar[Traits] = Traits(leaves_codes=True, keeps_zeros=True, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.trellis.technique:TrellisQuantization"
    paper: ClassVar[str] = (
        "Marcellin & Fischer 1990, Trellis coded quantization; Fischer & Wang 1992, Entropy-constrained trellis-coded "
        "quantization; Haase et al. 2021, Dependent scalar quantization for neural network compression"
    )

    technique: Literal["quantization/trellis"] = "quantization/trellis"
    rate: Rate = 4
    """Entropy of the codes in bits per weight that is not zero, in every layer."""
    per_layer: dict[str, Rate] = {}
    """Rates of single layers by name pattern (`features.*: 5`); the first pattern that matches counts."""
