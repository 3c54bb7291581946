"""Options of the techniques that prune by second derivatives."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rarefy_schemas import TechniqueConfig, Traits


class SecondOrderPruning(TechniqueConfig):
    """Options of every technique that removes single weights and corrects the others; biases are never pruned."""

    traits: ClassVar[Traits] = Traits(data="unlabelled", makes_zeros=True, keeps_zeros=True, needs_dense_floats=True)

    batches: int = Field(default=8, ge=1)
    """Number of calibration batches."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per calibration batch; the task's own number when absent."""
    damping: float = Field(default=0.01, gt=0)
    """Share of the Hessian's mean diagonal that is added to its diagonal; more holds the weights closer to theirs."""


class LayerwisePruning(SecondOrderPruning):
    """Options of the techniques that keep the outputs of one layer after the other."""

    amount: float | None = Field(default=None, gt=0, lt=1)
    """Share of each layer's weights that are zero afterwards."""
    per_layer: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Shares of single layers by name pattern (`features.*: 0.6`); the first pattern that matches counts."""
    sequential: bool = True
    """Calibrate each layer with those before it already pruned, on the inputs it will have."""


class SparseGPTConfig(LayerwisePruning):
    """Remove weights input by input and let the later inputs make up for them: fast enough for large layers."""

    implementation: ClassVar[str] = "rarefy_pruning.second_order.sparsegpt:SparseGPT"
    paper: ClassVar[str] = "Frantar & Alistarh 2023, SparseGPT: massive language models can be pruned in one shot"

    technique: Literal["pruning/sparsegpt"] = "pruning/sparsegpt"
    pattern: str | None = Field(default=None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """`n:m` keeps n of each m consecutive inputs (`2:4`), instead of `amount`."""
    block: int = Field(default=128, ge=1)
    """Number of inputs for which the weights to remove are chosen at once; each block gets the same share."""
    max_inputs: int = Field(default=16384, ge=1)
    """Most inputs of one output, kernel positions included; H takes their square, and larger layers are left alone."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.pattern is None:
            if self.amount is None and not self.per_layer:
                raise ValueError("give `amount`, the share of weights to remove, `per_layer` or `pattern`")
            return self
        keep, of = self.keep_of
        if keep >= of:
            raise ValueError(f"`pattern: {self.pattern}` removes nothing: keep fewer than {of} of {of}")
        if self.amount is not None or self.per_layer:
            raise ValueError("`pattern` says how many weights stay; leave out `amount` and `per_layer`")
        return self

    @property
    def keep_of(self) -> tuple[int, int]:
        """The two numbers of `pattern`, which must be given."""
        keep, _, of = (self.pattern or "").partition(":")
        return int(keep), int(of)


class OBSConfig(LayerwisePruning):
    """Remove one weight at a time, the one that costs least, and correct all others of its row exactly."""

    implementation: ClassVar[str] = "rarefy_pruning.second_order.obs:OBS"
    paper: ClassVar[str] = (
        "Hassibi & Stork 1992, Second order derivatives for network pruning: Optimal Brain Surgeon; "
        "Frantar et al. 2022, Optimal Brain Compression (the row-wise form)"
    )

    technique: Literal["pruning/obs"] = "pruning/obs"
    max_inputs: int = Field(default=1024, ge=1)
    """Most inputs of one output, kernel positions included; time grows with their cube, larger layers are left."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.amount is None and not self.per_layer:
            raise ValueError("give `amount`, the share of weights to remove, or `per_layer`")
        return self


class NetworkOBSConfig(SecondOrderPruning):
    """Remove one weight of a small network at a time and correct all others, in all layers."""

    implementation: ClassVar[str] = "rarefy_pruning.second_order.network:NetworkOBS"
    paper: ClassVar[str] = "Hassibi & Stork 1992, Second order derivatives for network pruning: Optimal Brain Surgeon"

    technique: Literal["pruning/obs-network"] = "pruning/obs-network"
    amount: float = Field(gt=0, lt=1)
    """Share of the weights of all target layers together that are zero afterwards."""
    rounds: int = Field(default=1, ge=1)
    """Number of times the Hessian is computed anew, at the weights reached so far, over equal shares of the way."""
    max_weights: int = Field(default=4096, ge=1)
    """Most weights and biases of the target layers; the Hessian takes their square, and larger networks are refused."""
