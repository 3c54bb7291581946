"""Options of the techniques with several codebooks per layer, and of soft weight-sharing."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import TechniqueConfig, Traits

from rarefy_quantization.config import VectorSharing

Rate = Annotated[float, Field(ge=0)]


class BlockSharing(VectorSharing):
    """Options of every technique that gives blocks of columns of a layer a codebook each."""

    codes: int = Field(default=16, ge=2, le=65536)
    """Number of vectors in the codebook of a block; a weight costs log2(codes) / length bits. A layer with m outputs
    and a codebook at each place has 32 * codes / m bits of codebooks per weight on top."""
    blocks: int | None = Field(default=None, ge=1)
    """Nearly equal blocks into which the places of a row are divided; absent, each place has a codebook, as in the
    papers, which pays for layers of thousands of outputs. 1 is one codebook for the layer."""


class ProductConfig(BlockSharing):
    """Share vectors of consecutive weights within blocks of columns: k-means in each, fine-tuning of the centroids."""

    implementation: ClassVar[str] = "rarefy_quantization.codebooks.product:ProductQuantization"
    paper: ClassVar[str] = (
        "Gong et al. 2014, Compressing deep convolutional networks using vector quantization (product quantization); "
        "Jegou et al. 2011, Product quantization for nearest neighbor search"
    )

    technique: Literal["quantization/product"] = "quantization/product"
    rounds: int = Field(default=50, ge=1)
    """Most iterations per block; it stops earlier when no vector changes its centroid."""


class ResidualConfig(VectorSharing):
    """Make vectors of consecutive weights sums: k-means, then k-means on what it left, and so on; fine-tuning of all.

    The layers become modules that keep codes and codebooks and add the vectors up for each forward pass: a smaller
    file, the same FLOPs, more time until `rarefy.plain` puts torch's layers back. At equal error `quantization/vector`
    took fewer bytes where it was measured, and `quantization/entropy-constrained` the fewest; stages reach errors for
    which one codebook is too large to search.
    """

    implementation: ClassVar[str] = "rarefy_quantization.codebooks.residual:ResidualQuantization"
    paper: ClassVar[str] = (
        "Gong et al. 2014, Compressing deep convolutional networks using vector quantization (residual quantization); "
        "Babenko & Lempitsky 2014, Additive quantization for extreme vector compression (`joint`)"
    )
    traits: ClassVar[Traits] = Traits(changes_shapes=True, keeps_zeros=False, needs_dense_floats=True)

    technique: Literal["quantization/residual"] = "quantization/residual"
    stages: int = Field(default=2, ge=1)
    """Codebooks of a layer, one vector of each in every sum; 1 is vector quantization."""
    codes: int = Field(default=256, ge=2, le=65536)
    """Number of vectors in the codebook of a stage; a weight costs stages * log2(codes) / length bits, and the
    codebooks come on top."""
    joint: bool = True
    """Whether the codebooks of all stages are moved together to the least squared error once the codes are found; it
    took 1% off the error."""
    rounds: int = Field(default=50, ge=1)
    """Most iterations per stage; it stops earlier when no vector changes its centroid."""


class QCNNConfig(BlockSharing):
    """Share vectors so that the responses of each layer stay nearest, behind layers that are already quantized."""

    implementation: ClassVar[str] = "rarefy_quantization.codebooks.q_cnn:QCNN"
    paper: ClassVar[str] = (
        "Wu et al. 2016, Quantized convolutional neural networks for mobile devices (the blocks of a convolution are "
        "of consecutive weights here, of channels at one position there)"
    )
    traits: ClassVar[Traits] = Traits(data="unlabelled", leaves_codes=True, keeps_zeros=False, needs_dense_floats=True)

    technique: Literal["quantization/q-cnn"] = "quantization/q-cnn"
    rounds: int = Field(default=10, ge=0)
    """Most alternations between codes and codebooks after k-means; it stops earlier when no code changes."""
    correct: bool = True
    """Fit the responses that a layer had in the original network, so that it makes up for the layers before it;
    otherwise those that it would have on its inputs by then."""
    batches: int = Field(default=8, ge=1)
    """Number of calibration batches."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per calibration batch; the task's own number when absent."""
    damping: float = Field(default=0.01, gt=0)
    """Share of the mean square of an input that is added to that of each; more makes it nearer to k-means."""
    max_inputs: int = Field(default=16384, ge=1)
    """Most inputs of one output, kernel positions included; memory takes their square, and larger layers are left
    alone."""


class SoftSharingConfig(TechniqueConfig):
    """Train weights towards the means of a Gaussian mixture, most of them towards zero, and set them to the means.

    `loss + strength * (-sum_i log sum_j pi_j N(w_i | mu_j, 1 / lambda_j) - log of the priors)`. Component 0 has the
    mean 0; the others, their precisions and shares are learned. All target layers share the mixture.
    """

    traits: ClassVar[Traits] = Traits(makes_zeros=True, leaves_codes=True, needs_dense_floats=True)
    implementation: ClassVar[str] = "rarefy_quantization.codebooks.soft_sharing:SoftSharing"
    paper: ClassVar[str] = (
        "Ullrich, Meeds & Welling 2017, Soft weight-sharing for neural network compression; Nowlan & Hinton 1992, "
        "Simplifying neural networks by soft weight-sharing"
    )

    technique: Literal["quantization/soft-weight-sharing"] = "quantization/soft-weight-sharing"
    strength: float = Field(gt=0)
    """Factor of the complexity, beside a loss that is a mean over samples: tau / N of the paper with N samples, where
    tau = 1 is the description length. 0.003 / 60000 there; more makes more zeros."""
    components: int = Field(default=16, ge=2, le=64)
    """Components of the mixture, that of the zeros included."""
    zero_share: float = Field(default=0.99, gt=0, lt=1)
    """Share pi_0 of the component of the zeros; fixed unless `zero_share_strength` is given."""
    zero_share_strength: float | None = Field(default=None, gt=0)
    """Learn pi_0 under a Beta prior with its mode at `zero_share` that counts as so many weights."""
    zero_precision: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(gt=0)]] = (5000, 2)
    """Shape and rate (a, b) of the Gamma prior on the precision of component 0: its mode is (a - 1) / b, one over the
    variance, and it counts as 2 (a - 1) weights."""
    precision: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(gt=0)]] = (250, 0.1)
    """Shape and rate of the Gamma prior on the precision of each other component."""
    mean_lr: Rate = 1e-4
    """Learning rate of the means, by Adam like those below. These three are the paper's, for ten thousand steps; in
    about a thousand the mixture follows the weights only at 3 to 10 times these rates."""
    precision_lr: Rate = 3e-3
    """Learning rate of the logarithms of the precisions."""
    share_lr: Rate = 3e-3
    """Learning rate of the logits of the shares."""
    merge: float = Field(default=0.1, ge=0)
    """Symmetric Kullback-Leibler divergence, in nats, below which two components become one in the end."""
    biases: bool = False
    """Whether the biases of the target layers are among the weights."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.finetune is None or self.finetune.epochs == 0:
            raise ValueError("weights gather around the means in training: give `finetune` with at least one epoch")
        if self.finetune.keep == "best" or self.finetune.patience:
            raise ValueError(
                "weights and mixture belong together, and those of the best epoch would meet the mixture of the last: "
                "leave out `patience` and use `keep: last`"
            )
        return self
