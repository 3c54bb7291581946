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
    from rarefy_quantization.config import (
        EntropyConstrainedConfig,
        GPTQConfig,
        KMeansConfig,
        UniformConfig,
        VectorConfig,
    )
    from rarefy_quantization.low_bit.config import BinaryConfig, TernaryConfig

    shared = [KMeansConfig, EntropyConstrainedConfig, VectorConfig]
    return [*shared, UniformConfig, GPTQConfig, BinaryConfig, TernaryConfig]


@hookimpl
def register_exporters() -> Iterable[type[ExporterConfig]]:
    """Register the formats that run on integer kernels."""
    from rarefy_quantization.execution.config import OnnxInt4Format, OnnxInt8Format

    return [OnnxInt8Format, OnnxInt4Format]
