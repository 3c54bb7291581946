"""Options of compact filters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from rarefy_schemas import TechniqueConfig, Traits


class DepthwiseSeparableConfig(TechniqueConfig):
    """Replace convolutions by a depthwise and a pointwise one, starting from the trained kernel."""

    implementation: ClassVar[str] = "rarefy_filters.depthwise_separable:DepthwiseSeparable"
    paper: ClassVar[str] = "Howard et al. 2017, MobileNets: Efficient convolutional neural networks for mobile vision"
    traits: ClassVar[Traits] = Traits(
        start="either", layers=("Conv2d",), changes_shapes=True, keeps_zeros=False, needs_dense_floats=True
    )

    technique: Literal["filters/depthwise-separable"] = "filters/depthwise-separable"
    multiplier: int = Field(default=1, ge=1)
    """Depthwise filters per input channel; more of them follow the trained kernel more closely."""
    batchnorm: bool = False
    """Put a batch normalization between the two; it changes the outputs until it is trained, so fine-tune."""
