"""Options of the techniques that quantize what layers are given."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import Traits

from rarefy_quantization.low_bit.config import LowBitQuantization


class XnorConfig(LowBitQuantization):
    """Give weights and inputs of layers two values each; with fine-tuning, train both through their signs.

    Layers compute with floats that take two values: the file becomes small, and nothing becomes faster here.
    """

    traits: ClassVar[Traits] = Traits(
        data="unlabelled",
        layers=("Linear", "Conv2d"),
        leaves_codes=True,
        keeps_zeros=False,
        needs_dense_floats=True,
        changes_shapes=True,
        may_grow=True,
    )
    implementation: ClassVar[str] = "rarefy_quantization.activations.xnor:Xnor"
    paper: ClassVar[str] = (
        "Rastegari et al. 2016, XNOR-Net: ImageNet classification using binary convolutional neural networks; Hubara "
        "et al. 2016, Binarized neural networks (BinaryNet)"
    )

    technique: Literal["quantization/xnor"] = "quantization/xnor"
    method: Literal["xnor-net", "binary-net"] = "xnor-net"
    """Scales of signs: the mean magnitude of the weights of each output, and of the inputs at each place; or those of
    the weights alone, one constant per layer, as BinaryConnect has it."""
    norm: Literal["where-needed", "always", "never"] = "where-needed"
    """Where a batch norm comes before the signs of inputs, which are all alike behind a ReLU: in front of each layer
    whose inputs are never negative on calibration data, of each layer, or of none."""
    batches: int = Field(default=4, ge=1)
    """Calibration batches from which these batch norms get their first mean and variance."""


class HwgqConfig(LowBitQuantization):
    """Give weights two values and what leaves each ReLU few; with fine-tuning, train real weights through both."""

    traits: ClassVar[Traits] = Traits(
        data="unlabelled", leaves_codes=True, keeps_zeros=False, needs_dense_floats=True, changes_shapes=True
    )
    implementation: ClassVar[str] = "rarefy_quantization.activations.hwgq:Hwgq"
    paper: ClassVar[str] = "Cai et al. 2017, Deep learning with low precision by half-wave Gaussian quantization"

    technique: Literal["quantization/hwgq"] = "quantization/hwgq"
    bits: int = Field(default=2, ge=1, le=8)
    """Bits of an activation: zero, and 2^bits - 1 levels above it."""
    levels: Literal["uniform", "free"] = "uniform"
    """Levels with the least squared error for the positive half of a normal distribution: evenly spaced ones, or any
    (Lloyd's)."""
    backward: Literal["clipped", "log-tailed"] = "clipped"
    """Gradient for inputs beyond the largest level q: 0, or 1 / (x - q + 1)."""
    sigma: Literal["one", "measured"] = "measured"
    """Standard deviation of the normal distribution: 1, as behind a fresh batch norm, or the root mean square of what
    passes each ReLU on calibration data, weights quantized. Without batch norms the network leaves it behind as it is
    trained."""
    batches: int = Field(default=4, ge=1)
    """Calibration batches that are measured."""


class FewMultiplicationsConfig(LowBitQuantization):
    """Train weights that are drawn from two or three values, their gradients from inputs rounded to powers of two.

    It shows what such training does to a network, and leaves the network that it gives; it makes nothing faster here.
    """

    traits: ClassVar[Traits] = Traits(start="either", leaves_codes=True, keeps_zeros=False, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.activations.few_multiplications:FewMultiplications"
    paper: ClassVar[str] = "Lin et al. 2016, Neural networks with few multiplications"

    technique: Literal["quantization/few-multiplications"] = "quantization/few-multiplications"
    values: Literal["ternary", "binary"] = "ternary"
    """Values of a weight: -a, 0 and a, or -a and a, with the constant a of Glorot's initialization. Training draws
    them, right on average; what is evaluated and what remains are the nearest."""
    shifts: int = Field(default=4, ge=0, le=16)
    """Inputs are rounded to powers of two from 2^-shifts to 2^shifts, and to zero below."""

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.granularity != "channel":
            raise ValueError("`granularity` says nothing here, as a layer has one constant; leave it out")
        if self.finetune is not None and self.finetune.precision != "no":
            raise ValueError(
                "`precision` of `finetune` has to be `no`: inputs are rounded where they are kept in float32"
            )
        return self
