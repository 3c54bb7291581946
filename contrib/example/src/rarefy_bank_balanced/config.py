"""Options of pruning/bank-balanced."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from rarefy_schemas import TechniqueConfig, Traits


class BankBalancedConfig(TechniqueConfig):
    """Remove the same share of smallest weights from every bank of each output."""

    implementation: ClassVar[str] = "rarefy_bank_balanced.bank_balanced:BankBalanced"
    paper: ClassVar[str] = "Cao et al. 2019, Efficient and effective sparse LSTM on FPGA with bank-balanced sparsity"
    traits: ClassVar[Traits] = Traits(makes_zeros=True, needs_dense_floats=True)

    technique: Literal["pruning/bank-balanced"] = "pruning/bank-balanced"
    amount: float = Field(default=0.5, gt=0, lt=1)
    """Share of the weights of each bank that are zero afterwards, rounded to whole weights."""
    bank: int = Field(default=16, ge=2)
    """Weights per bank, consecutive among those of one output."""
