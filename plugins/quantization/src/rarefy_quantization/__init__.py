"""Quantization and weight-sharing techniques."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rarefy.hookspecs import hookimpl

if TYPE_CHECKING:
    from rarefy_schemas import ExporterConfig, TechniqueConfig


@hookimpl
def register_techniques() -> Iterable[type[TechniqueConfig]]:
    """Register the family."""
    from rarefy_quantization.activations.config import FewMultiplicationsConfig, HwgqConfig, XnorConfig
    from rarefy_quantization.codebooks.config import ProductConfig, QCNNConfig, ResidualConfig, SoftSharingConfig
    from rarefy_quantization.config import (
        EntropyConstrainedConfig,
        GPTQConfig,
        KMeansConfig,
        UniformConfig,
        VectorConfig,
    )
    from rarefy_quantization.low_bit.config import BinaryConfig, TernaryConfig
    from rarefy_quantization.rounding.config import AdaRoundConfig, EqualizeConfig, FixedPointConfig, PrecisionConfig
    from rarefy_quantization.trellis.config import TrellisConfig

    scalars = [KMeansConfig, EntropyConstrainedConfig, SoftSharingConfig]
    vectors = [VectorConfig, ProductConfig, ResidualConfig, QCNNConfig]
    grids = [UniformConfig, GPTQConfig, AdaRoundConfig, TrellisConfig, FixedPointConfig, PrecisionConfig]
    low_bit = [BinaryConfig, TernaryConfig, XnorConfig, HwgqConfig, FewMultiplicationsConfig]
    return [*scalars, *vectors, *grids, EqualizeConfig, *low_bit]


@hookimpl
def register_exporters() -> Iterable[type[ExporterConfig]]:
    """Register the formats that run on integer kernels."""
    from rarefy_quantization.execution.config import OnnxInt4Format, OnnxInt8Format

    return [OnnxInt8Format, OnnxInt4Format]
