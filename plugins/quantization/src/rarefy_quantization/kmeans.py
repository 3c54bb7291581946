"""Weight sharing by k-means."""

from __future__ import annotations

import torch

from rarefy_quantization.config import KMeansConfig
from rarefy_quantization.lloyd import INITS, lloyd, nearest
from rarefy_quantization.sharing import TensorQuantizer


class KMeans(TensorQuantizer[KMeansConfig]):
    """Least squared error within a layer (Deep Compression, eq. 2), weighed by importance where that is known."""

    def quantize(
        self, values: torch.Tensor, importance: torch.Tensor | None, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cluster the values; up to `count` distinct ones are kept as they are."""
        precise = values.double()
        ordered, order = precise.sort()
        codebook = torch.unique_consecutive(ordered)
        if codebook.numel() > count:
            start = INITS[self.config.init](ordered, count, generator)
            codebook = lloyd(ordered, start, self.config.rounds, None if importance is None else importance[order])
        codebook = torch.unique(codebook.to(values.dtype))
        return nearest(precise, codebook.double()), codebook
