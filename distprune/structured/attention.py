"""Multi-head attention with fewer heads than `torch.nn.MultiheadAttention` can have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ThinAttention(nn.Module):
    """Attention whose heads together are narrower than its input; parameters are named as in nn.MultiheadAttention.

    Args:
        embed_dim: channels of input and output.
        num_heads: how many are left.
        head_dim: channels of each.
        dropout: of attention weights, while training.
        bias: of projections.
        batch_first: whether inputs are (batch, positions, channels), else (positions, batch, channels).
    """

    # Asked by nn.TransformerEncoderLayer, whose fast path knows the heads of nn.MultiheadAttention only.
    _qkv_same_embed_dim = False

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int, dropout: float, bias: bool, batch_first: bool
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.batch_first = batch_first
        inner = num_heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, embed_dim, bias)

    @classmethod
    def like(cls, attention: nn.MultiheadAttention) -> ThinAttention:
        """All heads of `attention`, and its very parameters."""
        thin = cls(
            attention.embed_dim, attention.num_heads, attention.head_dim, attention.dropout,
            attention.in_proj_bias is not None, attention.batch_first,
        )  # fmt: skip
        thin.in_proj_weight, thin.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        thin.out_proj = attention.out_proj
        return thin.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention, of batches; masks are added, or bool and True where nothing is to be seen."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        queries, keys, values = (
            F.linear(x, w, b).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, query)
        scale = self.head_dim**-0.5
        if need_weights:
            logits = queries @ keys.transpose(-2, -1) * scale
            probabilities = (logits if mask is None else logits + mask).softmax(-1)
            mixed = F.dropout(probabilities, self.dropout, self.training) @ values
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=scale)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, probabilities.mean(1) if average_attn_weights else probabilities

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """What is added to logits of shape (batch, heads, positions, positions)."""
        total: Tensor | None = None
        if attn_mask is not None:
            # One for each head of each sample cannot be told apart from fewer heads.
            if attn_mask.dim() == 3:
                raise ValueError("a mask for each head does not fit attention from which heads were removed")
            total = _added(attn_mask, query.dtype)
        if padding is not None:
            total = _added(padding, query.dtype)[:, None, None] + (0 if total is None else total)
        return total


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
