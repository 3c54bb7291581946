"""The truncated singular value decomposition: of all factors of a rank, those with the least squared error."""

from __future__ import annotations

import torch
from torch import nn

from rarefy_factorization.config import SvdConfig
from rarefy_factorization.factorizer import Factorizer, Factors
from rarefy_factorization.schemes import ChannelScheme, LinearScheme, Scheme, SpatialScheme

_PRECISE = 1 << 22


class Svd(Factorizer[SvdConfig]):
    """Gives both factors the square root of the singular values, so that neither dominates in fine-tuning."""

    def scheme(self, layer: nn.Module) -> Scheme:
        """Choose by layer type and kernel; a kernel of height or width 1 has nothing to separate."""
        if isinstance(layer, nn.Linear):
            return LinearScheme()
        if isinstance(layer, nn.Conv2d) and self.config.scheme == "spatial" and min(layer.kernel_size) > 1:
            return SpatialScheme()
        return ChannelScheme()

    def spectrum(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the singular values."""
        values: torch.Tensor = torch.linalg.svdvals(_precise(matrix))
        return values

    def factors(self, matrix: torch.Tensor, rank: int) -> Factors:
        """Return `U sqrt(S)` and `sqrt(S) V^T`, cut to the rank (Tai et al. 2016, theorem 1)."""
        u, s, v = torch.linalg.svd(_precise(matrix), full_matrices=False)
        root = s[:, :rank].sqrt()
        return Factors(u[:, :, :rank] * root.unsqueeze(1), root.unsqueeze(2) * v[:, :rank])


def _precise(matrix: torch.Tensor) -> torch.Tensor:
    """Return float64 where that takes no long time; half precision has no decomposition at all."""
    return matrix.to(torch.float64 if matrix.numel() < _PRECISE else torch.float32)
