"""Options of the formats that run on integer kernels."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from rarefy_schemas import ExporterConfig
from rarefy_schemas.base import Schema


class QuantizedOnnxFormat(ExporterConfig):
    """Options of every ONNX format with quantized weights."""

    opset: int = Field(default=18, ge=18)
    """Version of ONNX's operator set."""
    dynamic_batch: bool = True
    """Whether the first dimension of every input may vary."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over the names of layers that stay in float32 (`head*`)."""
    max_error: float = Field(default=0.5, gt=0)
    """Largest accepted error of the outputs on the validation split: the root of its mean square, as a share of the
    outputs' standard deviation. A file beyond it is not kept."""
    rounds: int = Field(default=20, ge=3)
    """Interleaved timings of this file and the float32 file."""
    batch_size: int = Field(default=1, ge=1)
    """Samples per forward pass of the timings."""


class FloatTarget(Schema):
    """Time or bytes that a file may take; what integers leave of it goes to layers in float32.

    Those stay in float32 that move the outputs most, for what they cost, when they alone are quantized.
    """

    measure: Literal["latency", "bytes"] = "latency"
    """What `most` counts: the time of a forward pass of `batch_size` samples, measured on this machine, or bytes."""
    most: float = Field(gt=0, le=1)
    """What the file may take, as a share of what the float32 file takes."""
    batches: int = Field(default=2, ge=1)
    """Calibration batches on which the outputs are compared, layer by layer."""


class OnnxInt8Format(QuantizedOnnxFormat):
    """ONNX on 8-bit integer kernels: weights and activations quantized, ranges calibrated. Needs the extra `onnx`."""

    implementation: ClassVar[str] = "rarefy_quantization.execution.int8:OnnxInt8Exporter"
    paper: ClassVar[str] = (
        "Jacob et al. 2018, Quantization and training of neural networks for efficient integer-arithmetic-only "
        "inference; the QuantizeLinear and DequantizeLinear operators of ONNX"
    )

    symmetric: ClassVar[bool] = False

    format: Literal["onnx-int8"] = "onnx-int8"
    range: Literal["min-max", "percentile", "mse", "entropy"] = "min-max"
    """Activations that the 256 values of a tensor reach: all; those up to `percentile`; those with the least squared
    error of rounding and clipping; or those with the least Kullback-Leibler divergence of the histogram."""
    percentile: float = Field(default=99.9, gt=50, le=100)
    """Percentage of the activations that `range: percentile` reaches, counted from either end, zeros left out."""
    batches: int = Field(default=8, ge=1)
    """Number of calibration batches."""
    calibration_batch_size: int | None = Field(default=None, ge=1)
    """Samples per calibration batch; the task's own number when absent."""
    target: FloatTarget | None = None
    """Keep the layers that suffer most in float32, as many as these bytes or this time allow, beside those that
    `exclude` names; without it only these."""


class OnnxInt4Format(QuantizedOnnxFormat):
    """ONNX with 4-bit weights of linear layers, multiplied block by block. Needs the extra `onnx`."""

    implementation: ClassVar[str] = "rarefy_quantization.execution.int4:OnnxInt4Exporter"
    paper: ClassVar[str] = "the operator MatMulNBits of ONNX Runtime"

    format: Literal["onnx-int4"] = "onnx-int4"
    group_size: Literal[32, 64, 128] = 32
    """Consecutive inputs of an output that share a step, where the weights are not in groups already."""
