"""Options of the techniques for weights of one or two bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import TechniqueConfig, Traits


class LowBitQuantization(TechniqueConfig):
    """Options of every technique that trains weights of one or two bits.

    Fine-tuning trains real weights, of which every forward pass takes the quantized ones. Biases are left alone.
    """

    keep_ends: bool = True
    """Leave the first and the last layer that an input reaches as they are, as XNOR-Net and TTQ do."""
    granularity: Literal["tensor", "channel"] = "channel"
    """What has a scale of its own: the layer, as for TWN and loss-aware binarization in their papers, or each output
    channel, as for BWN. The values of `binary-connect` and `ttq` are always those of the layer."""

    def refuse_foreign(self, method: str, owners: Mapping[str, tuple[str, ...]]) -> None:
        """Raise `ValueError` when an option is given that `method` does not have; `owners` are those that have it."""
        for option, methods in owners.items():
            if method not in methods and getattr(self, option) != type(self).model_fields[option].default:
                have = " and ".join(f"`method: {name}`" for name in methods)
                raise ValueError(f"`{option}` is an option of {have}, and the method is {method}; leave it out")


class BinaryConfig(LowBitQuantization):
    """Give weights two values, -a and a; with fine-tuning, train real weights through their signs."""

    traits: ClassVar[Traits] = Traits(leaves_codes=True, keeps_zeros=False, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.low_bit.binary:Binary"
    paper: ClassVar[str] = (
        "Courbariaux et al. 2015, BinaryConnect; Rastegari et al. 2016, XNOR-Net: ImageNet classification using binary "
        "convolutional neural networks (BWN); Hou et al. 2017, Loss-aware binarization of deep networks"
    )

    technique: Literal["quantization/binary"] = "quantization/binary"
    method: Literal["binary-connect", "bwn", "loss-aware"] = "bwn"
    """Values of a weight: its sign times a constant of the layer; its sign times the mean magnitude; or its sign times
    the mean magnitude weighted by the root of the mean squared gradient, the curvature that Adam estimates."""
    scale: Literal["glorot", "one"] = "glorot"
    """Constant of `binary-connect`: that of Glorot's initialization, sqrt(1.5 / (inputs + outputs)), or 1, which wants
    batch normalization after the layer. Weights in training stay between it and its negative."""
    stochastic: bool = False
    """Whether training with `binary-connect` draws signs, + with the probability (w / scale + 1) / 2; what is evaluated
    and what remains are the deterministic signs."""
    gradient: Literal["straight-through", "scaled"] = "straight-through"
    """Gradient of `bwn` for a real weight: that of its quantized one, or the paper's, which multiplies it by 1/n plus,
    for weights up to 1, the scale, with n weights per scale."""

    @model_validator(mode="after")
    def _no_foreign_options(self) -> Self:
        connect, scaled = ("binary-connect",), ("bwn", "loss-aware")
        owners = {"scale": connect, "stochastic": connect, "gradient": ("bwn",), "granularity": scaled}
        self.refuse_foreign(self.method, owners)
        return self


class TernaryConfig(LowBitQuantization):
    """Give weights three values, one of them zero; with fine-tuning, train real weights through the thresholds."""

    traits: ClassVar[Traits] = Traits(leaves_codes=True, keeps_zeros=True, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.low_bit.ternary:Ternary"
    paper: ClassVar[str] = (
        "Li, Zhang & Liu 2016, Ternary weight networks (TWN); Zhu et al. 2017, Trained ternary quantization (TTQ)"
    )

    technique: Literal["quantization/ternary"] = "quantization/ternary"
    method: Literal["twn", "ttq"] = "twn"
    """Values of a weight: -a, 0 and a with the a that fits best; or -n, 0 and p of the layer, which are learned.
    `ttq` trains weights over the largest of the layer, and with Adam wants a learning rate near 0.01."""
    threshold: Literal["approximate", "exact"] = "approximate"
    """Magnitude above which `twn` keeps a weight: 0.7 times the mean of those that are not zero, or the one with the
    least squared error, which sorts the weights at every step."""
    share: float = Field(default=0.05, ge=0, lt=1)
    """Magnitude above which `ttq` keeps a weight, as a share of the largest of the layer."""

    @model_validator(mode="after")
    def _no_foreign_options(self) -> Self:
        twn = ("twn",)
        self.refuse_foreign(self.method, {"threshold": twn, "granularity": twn, "share": ("ttq",)})
        return self
