"""Options of the techniques on how weights are rounded."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
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


class FixedPointConfig(TechniqueConfig):
    """Keep weights in fixed point; with fine-tuning, round them again after every update, up or down by chance.

    Gradients, activations and the state of the optimizer stay in floating point, unlike those of the paper.
    """

    traits: ClassVar[Traits] = Traits(start="either", leaves_codes=True, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.rounding.fixed_point:FixedPoint"
    paper: ClassVar[str] = "Gupta et al. 2015, Deep learning with limited numerical precision"

    technique: Literal["quantization/fixed-point"] = "quantization/fixed-point"
    integer_bits: int = Field(default=2, ge=1, le=16)
    """Bits before the point, the sign among them: values reach from -2^(integer_bits - 1) up to one step below the
    opposite."""
    fraction_bits: int = Field(default=14, ge=0, le=22)
    """Bits after the point: the step is 2^-fraction_bits. 24 bits in all at most, which float32 holds exactly."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updated weights are rounded in training. Stochastic is right on average; to the nearest, updates of less than
    half a step are lost. What is rounded before training goes to the nearest."""
    biases: bool = True
    """Whether the biases of the layers are kept in fixed point too."""

    @model_validator(mode="after")
    def _fits_float32(self) -> Self:
        if self.integer_bits + self.fraction_bits > 24:
            total = self.integer_bits + self.fraction_bits
            raise ValueError(f"`integer_bits` and `fraction_bits` make {total} bits, and float32 holds 24; give fewer")
        return self


class PrecisionConfig(TechniqueConfig):
    """Round what is still in floating point - biases, norms, codebooks, plain weights - to fewer significant bits.

    Tensors that already are multiples of steps are left alone. A file holds rounded numbers in fewer bytes; values that
    were equal stay equal, so it may follow any step, and is best the last.
    """

    traits: ClassVar[Traits] = Traits(layers=("*",), leaves_codes=True)
    implementation: ClassVar[str] = "rarefy_quantization.rounding.precision:Precision"
    paper: ClassVar[str] = "IEEE 754; Kalamkar et al. 2019, A study of bfloat16 for deep learning training"

    technique: Literal["quantization/precision"] = "quantization/precision"
    bits: int = Field(default=8, ge=1, le=24)
    """Significant bits, the leading one among them: 8 as in bfloat16, 11 as in float16, 24 as in float32. The range of
    exponents stays that of the tensor."""
