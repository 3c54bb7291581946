"""A small vision transformer.

Dosovitskiy et al. 2021, "An image is worth 16x16 words".
"""

from __future__ import annotations

import torch
from torch import nn

from rarefy.errors import RecipeError
from rarefy.zoo.transformer import Block, init_


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings and transformer blocks."""

    def __init__(
        self, num_classes: int, in_channels: int, size: int, patch: int, width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        if patch < 1 or size < 1 or size % patch:
            raise RecipeError(f"images of size {size} cannot be cut into patches of {patch}; choose a divisor")
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        init_(self)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits `(n, num_classes)` of images `(n, in_channels, size, size)`."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        logits: torch.Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def vit_tiny(
    num_classes: int = 10,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 128,
    depth: int = 6,
    num_heads: int = 4,
) -> VisionTransformer:
    """Build a vision transformer of 1.2 million parameters for images `(in_channels, size, size)`."""
    return VisionTransformer(num_classes, in_channels, size, patch, width, depth, num_heads)
