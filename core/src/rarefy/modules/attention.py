"""Multi-head attention whose heads need not add up to its width, so that heads can be removed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from rarefy.modules.kinds import register_module


@register_module
class MultiheadAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, with any number of heads of any width.

    Vaswani et al. 2017, section 3.2.2. Parameters have the names and orders of `nn.MultiheadAttention`; rows of the
    projections are (heads, head_dim).
    """

    # tells nn.TransformerEncoderLayer not to hand the weights to its fused kernel, which knows no other head counts
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        scale: float,
        bias: bool = True,
        dropout: float = 0.0,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.scale = embed_dim, num_heads, head_dim, scale
        self.kdim, self.vdim = kdim, vdim
        self.bias, self.dropout, self.batch_first = bias, dropout, batch_first
        inner = num_heads * head_dim
        if kdim is None and vdim is None:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(inner, embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(inner, kdim or embed_dim))
            self.v_proj_weight = nn.Parameter(torch.empty(inner, vdim or embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, embed_dim, bias=bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended values, shaped like `query`, and the attention weights when they are needed."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q, k, is_causal and attn_mask is None)
        weights = None
        drop = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, drop) if drop else weights
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=self.scale)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values, each (batch, heads, tokens, head_dim)."""
        if self.kdim is None and self.vdim is None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        return [x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in projected]

    def _mask(
        self, mask: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, causal: bool
    ) -> torch.Tensor | None:
        """Return what is added to the scores, broadcast to (batch, heads, queries, keys)."""
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        if mask is not None and mask.dim() == 3:
            # (batch * heads, queries, keys), which only fits as long as no head was removed
            mask = mask.view(q.shape[0], -1, *mask.shape[1:])
        parts = [mask] if mask is not None else []
        if padding is not None:
            # (batch, keys), or (keys,) without a batch
            parts.append(padding.view(-1, 1, 1, padding.shape[-1]))
        added = [_additive(part, q.dtype) for part in parts]
        return None if not added else sum(added[1:], added[0])


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)


def opened(attention: nn.MultiheadAttention) -> nn.Module:
    """Return the same attention as a `MultiheadAttention` on the same parameters, itself when it has extra tokens."""
    if attention.bias_k is not None or attention.add_zero_attn:
        return attention
    same = attention.kdim == attention.embed_dim and attention.vdim == attention.embed_dim
    with torch.device("meta"):
        module = MultiheadAttention(
            attention.embed_dim,
            attention.num_heads,
            attention.head_dim,
            attention.head_dim**-0.5,
            bias=attention.in_proj_bias is not None,
            dropout=attention.dropout,
            kdim=None if same else attention.kdim,
            vdim=None if same else attention.vdim,
            batch_first=attention.batch_first,
        )
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
        if getattr(module, name, None) is not None:
            setattr(module, name, getattr(attention, name))
    module.out_proj = attention.out_proj
    return module.train(attention.training)
