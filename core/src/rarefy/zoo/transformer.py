"""The block that the vision and the language transformer share.

Vaswani et al. 2017, "Attention is all you need", with the normalization in front of each half.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from rarefy.errors import RecipeError


class Attention(nn.Module):
    """Self-attention over `(n, tokens, width)` with one projection for query, key and value."""

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise RecipeError(f"width {width} cannot be split into {num_heads} heads; choose a multiple of the heads")
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(n, tokens, width)`."""
        # (n, tokens, 3, heads, head) -> three of (n, heads, tokens, head)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: torch.Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then two linear layers, each with a residual connection."""

    def __init__(self, width: int, num_heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(n, tokens, width)`."""
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.fc2(self.gelu(self.fc1(self.norm2(x))))
        return out


def init_(model: nn.Module) -> None:
    """Draw linear and embedding weights from a normal distribution of deviation 0.02 and zero the biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
