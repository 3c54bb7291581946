"""A small causal transformer.

Radford et al. 2019, "Language models are unsupervised multitask learners".
"""

from __future__ import annotations

import torch
from torch import nn

from rarefy.zoo.transformer import Block, init_


class CausalTransformer(nn.Module):
    """Token and position embeddings, causal blocks, and a head that may share the token embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, num_heads: int, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(1, context, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        init_(self)
        nn.init.normal_(self.positions, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `(n, length, vocabulary)` of int64 tokens `(n, length)`, `length` at most the context."""
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def gpt_tiny(
    vocabulary: int = 256, context: int = 64, width: int = 64, depth: int = 2, num_heads: int = 4, tied: bool = True
) -> CausalTransformer:
    """Build a causal transformer of 0.12 million parameters over bytes."""
    return CausalTransformer(vocabulary, context, width, depth, num_heads, tied)
