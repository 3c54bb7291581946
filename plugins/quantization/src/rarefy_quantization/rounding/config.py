"""Options of the techniques on how weights are rounded."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from rarefy_schemas import TechniqueConfig, Traits

from rarefy_quantization.config import CalibratedGridQuantization


class AdaRoundConfig(CalibratedGridQuantization):
    """Learn for each weight whether it is rounded up or down, layer by layer, so that outputs stay the nearest."""

    implementation: ClassVar[str] = "rarefy_quantization.rounding.adaround:AdaRound"
    paper: ClassVar[str] = "Nagel et al. 2020, Up or down? Adaptive rounding for post-training quantization"

    technique: Literal["quantization/adaround"] = "quantization/adaround"
    iterations: int = Field(default=500, ge=1)
    """Steps of the optimizer per layer; each looks at all of the calibration data, by its second moments."""
    lr: float = Field(default=0.03, gt=0)
    """Learning rate of Adam for what decides about up and down."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the regulariser that drives decisions to up or down, against the error that a move by one code makes
    on average."""
    settle: bool = True
    """Whether decisions are reversed afterwards, one by one, as long as that lowers the error; the paper does not."""


class EqualizeConfig(TechniqueConfig):
    """Balance the ranges of channels between the layers that write and read them, the network's function kept."""

    traits: ClassVar[Traits] = Traits(changes_shapes=True, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.rounding.equalize:Equalize"
    paper: ClassVar[str] = "Nagel et al. 2019, Data-free quantization through weight equalization and bias correction"

    technique: Literal["quantization/equalize"] = "quantization/equalize"
    fold: bool = True
    """Take batch norms into the layers before them first; channels with a norm in their midst are left alone."""
    rounds: int = Field(default=50, ge=1)
    """Most passes over all pairs of layers; it stops earlier when none changes a channel by more than 0.1 %."""
