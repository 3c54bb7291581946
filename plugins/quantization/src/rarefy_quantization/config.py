"""Options of the quantization techniques."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import DataNeed, TechniqueConfig, Traits

from rarefy_quantization.budget import BitTarget, GridBits

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
    importance: Literal["none", "curvature"] = "none"
    """What weighs the squared error of a weight: nothing, or the second derivative of the loss in it, measured on
    labelled data. Measure the statistics of batch norms anew afterwards (`recovery/batch-norm`): without, it hurt."""
    batches: int = Field(default=4, ge=1)
    """Training batches that `importance: curvature` looks at."""
    probes: int = Field(default=8, ge=1)
    """Products with the Hessian per layer and batch that it takes; more are more precise."""

    def needed_data(self) -> DataNeed:
        """Return `labelled` where the loss is differentiated."""
        return "none" if self.importance == "none" else "labelled"


class KMeansConfig(WeightSharing):
    """Share weights: k-means over the weights of each layer, then fine-tuning of the centroids."""

    implementation: ClassVar[str] = "rarefy_quantization.kmeans:KMeans"
    paper: ClassVar[str] = (
        "Han, Mao & Dally 2016, Deep Compression; Gong et al. 2014, Compressing deep convolutional networks; Choi et "
        "al. 2017, Towards the limit of network quantization (`importance: curvature`)"
    )

    technique: Literal["quantization/kmeans"] = "quantization/kmeans"
    init: Literal["linear", "density", "random"] = "linear"
    """First centroids: evenly from the least to the greatest weight, at even quantiles, or random weights."""
    rounds: int = Field(default=10_000, ge=1)
    """Most iterations per layer; it stops earlier when no weight changes its centroid."""


class EntropyConstrainedConfig(WeightSharing):
    """Share weights so that error and entropy of the codes are least together, at one price of a bit in all layers."""

    implementation: ClassVar[str] = "rarefy_quantization.entropy_constrained:EntropyConstrained"
    paper: ClassVar[str] = (
        "Choi, El-Khamy & Lee 2017, Towards the limit of network quantization; Chou, Lookabaugh & Gray 1989, "
        "Entropy-constrained vector quantization"
    )

    technique: Literal["quantization/entropy-constrained"] = "quantization/entropy-constrained"
    bits: Bits = 6
    """A layer starts from 2^bits evenly spaced values, and loses those that are not worth their bits."""
    rate: float = Field(gt=0, le=8)
    """Entropy of the codes, mean over all weights that are not zero, in bits; layers get as much of it as lowers the
    error most."""
    rounds: int = Field(default=100, ge=1)
    """Most iterations per layer; it stops earlier when no weight changes its value."""


class VectorSharing(TechniqueConfig):
    """Options of every technique that gives vectors of consecutive weights common codebooks."""

    traits: ClassVar[Traits] = Traits(leaves_codes=True, keeps_zeros=False, needs_dense_floats=True)

    length: Literal[2, 3, 4, 6, 8, 9, 16, 25, 32] = 4
    """Weights of a vector: consecutive ones of a row, which is all that makes one output; a 3 x 3 kernel has 9."""


class VectorConfig(VectorSharing):
    """Share vectors of consecutive weights: k-means over those of each layer, then fine-tuning of the centroids."""

    implementation: ClassVar[str] = "rarefy_quantization.vectors:VectorQuantization"
    paper: ClassVar[str] = (
        "Gong et al. 2014, Compressing deep convolutional networks using vector quantization; Stock et al. 2020, And "
        "the bit goes down: revisiting the quantization of neural networks (one codebook per layer, fine-tuned)"
    )

    technique: Literal["quantization/vector"] = "quantization/vector"
    codes: int = Field(default=256, ge=2, le=65536)
    """Number of vectors that a layer may take; a weight costs log2(codes) / length bits, and the codebook comes on
    top."""
    rounds: int = Field(default=50, ge=1)
    """Most iterations per layer; it stops earlier when no vector changes its centroid."""


class GridQuantization(TechniqueConfig):
    """Options of every technique that rounds weights to multiples of a step size.

    Steps have 16 significant bits, so that step times code is exact in float32. Zero is always one of the values, so
    weights that are zero stay it. Biases are left alone.
    """

    traits: ClassVar[Traits] = Traits(leaves_codes=True, keeps_zeros=True, needs_dense_floats=True)

    bits: GridBits = 8
    """Bits per code: a weight takes one of 2^bits values."""
    per_layer: dict[str, GridBits] = {}
    """Bits of single layers by name pattern (`features.*: 4`); the first pattern that matches counts."""
    target: BitTarget | None = None
    """Bits or bytes that all codes may take together, in place of `bits`: each layer that `per_layer` does not name
    gets the bits that serve the model best."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What has a step size of its own: the layer, each output channel, or `group_size` consecutive weights of one."""
    group_size: Literal[32, 64, 128] = 128
    """Weights of a group; the last one of a channel may be smaller, and a channel with fewer is one group."""
    symmetric: bool = True
    """Codes from -2^(bits-1) to 2^(bits-1) - 1; otherwise 2^bits codes that begin where the weights do, with an integer
    zero point."""
    range: Literal["min-max", "percentile", "mse", "entropy"] = "min-max"
    """Values that the codes reach: all; those up to `percentile`; those with the least squared error of rounding and
    clipping, after which batch norms want their statistics measured anew (`recovery/batch-norm`); or those with the
    least Kullback-Leibler divergence of the histogram of the layer, as for activations."""
    percentile: float = Field(default=99.9, gt=50, le=100)
    """Percentage of the weights that `range: percentile` reaches, counted from either end, zeros left out."""

    @model_validator(mode="after")
    def _one_way_to_choose_bits(self) -> Self:
        if self.target is not None and self.bits != type(self).model_fields["bits"].default:
            raise ValueError("`bits` and `target` both say how many bits a layer gets; give one")
        return self

    def needed_data(self) -> DataNeed:
        """Return what the technique itself needs, and what the choice of bits does."""
        if self.target is None:
            return self.traits.data
        return "labelled" if self.target.by == "loss" else "unlabelled"


class UniformConfig(GridQuantization):
    """Round weights to evenly spaced values; with fine-tuning, train weights and step sizes through the rounding."""

    implementation: ClassVar[str] = "rarefy_quantization.uniform:Uniform"
    paper: ClassVar[str] = (
        "Jacob et al. 2018, Quantization and training of neural networks for efficient integer-arithmetic-only "
        "inference; Esser et al. 2020, Learned step size quantization (fine-tuning); Nagel et al. 2019, Data-free "
        "quantization through weight equalization and bias correction"
    )

    technique: Literal["quantization/uniform"] = "quantization/uniform"
    correct_bias: bool = False
    """Whether the mean error that rounding makes in each output, on unlabelled data, is taken off the layer's bias."""
    batches: int = Field(default=8, ge=1)
    """Calibration batches that `correct_bias` looks at."""

    def needed_data(self) -> DataNeed:
        """Return `unlabelled` where biases are corrected, or what the choice of bits asks for."""
        needed = super().needed_data()
        return "unlabelled" if self.correct_bias and needed == "none" else needed


class CalibratedGridQuantization(GridQuantization):
    """Options of every technique that rounds one layer after the other so that its outputs stay the nearest."""

    traits: ClassVar[Traits] = Traits(data="unlabelled", leaves_codes=True, keeps_zeros=True, needs_dense_floats=True)

    bits: GridBits = 4
    """Bits per code: a weight takes one of 2^bits values."""
    batches: int = Field(default=8, ge=1)
    """Number of calibration batches."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per calibration batch; the task's own number when absent."""
    sequential: bool = True
    """Calibrate each layer with those before it already quantized, on the inputs it will have."""
    max_inputs: int = Field(default=16384, ge=1)
    """Most inputs of one output, kernel positions included; H takes their square, and larger layers are left alone."""


class GPTQConfig(CalibratedGridQuantization):
    """Round weights input by input and let the later inputs make up for the error of the outputs."""

    implementation: ClassVar[str] = "rarefy_quantization.gptq:GPTQ"
    paper: ClassVar[str] = (
        "Frantar et al. 2023, GPTQ: accurate post-training quantization for generative pre-trained transformers"
    )

    technique: Literal["quantization/gptq"] = "quantization/gptq"
    order: Literal["data", "activation"] = "activation"
    """Order in which inputs are rounded: as they lie, or those with the largest mean square first, before errors have
    gathered."""
    damping: float = Field(default=0.01, gt=0)
    """Share of the Hessian's mean diagonal that is added to its diagonal; more makes it nearer to plain rounding."""
    block: int = Field(default=128, ge=1)
    """Inputs between two updates of all later ones; it changes the time, and the result only by rounding."""
