"""Post-norm transformer layers as in ACT and DETR: every layer adds positions to queries and keys,
but not to values.

All tensors are (batch, tokens, width). Parameters have the names of ``torch.nn.Transformer*Layer``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.act.config import ActConfig


class Attention(nn.Module):
    """Multi-head attention with the parameters of ``torch.nn.MultiheadAttention``.

    Args:
        width: Channels D of a token.
        n_heads: Heads.
        dropout: Probability for attention weights in training.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """(B, Q, D), (B, K, D), (B, K, D) to (B, Q, D).

        Args:
            query, key, value: The inputs.
            key_padding_mask: (B, K) bool, True for keys to ignore.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def zero_value_output(self) -> Tensor:
        """Return (D,), the output where all values are zero, for any queries and keys.

        Every projected value is then the value bias, and so is any weighted average of them.
        """
        value_bias = self.in_proj_bias.chunk(3)[2]
        return self.out_proj(value_bias)  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    """The feed-forward block of both kinds of layers: linear1, activation, dropout, linear2."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, config.width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        self.activation = F.gelu if config.activation == "gelu" else F.relu
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D), without skip connection and norm."""
        return self.linear2(self.dropout(self.activation(self.linear1(x))))  # type: ignore[no-any-return]


class EncoderLayer(_FeedForward):
    """Self-attention and feed-forward, each with a skip connection and a norm after it."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.width, config.n_heads, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, x: Tensor, pos: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D).

        Args:
            x: The tokens.
            pos: (N, D) positions.
            key_padding_mask: (B, N) bool, True for tokens to ignore.
        """
        q = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, key_padding_mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


class DecoderLayer(_FeedForward):
    """Self-attention, cross-attention and feed-forward, each with a skip connection and a norm."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.width, config.n_heads, config.dropout)
        self.multihead_attn = Attention(config.width, config.n_heads, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.norm3 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor | None, query_pos: Tensor, memory: Tensor, keys: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D).

        Args:
            x: (B, T, D), or None for the first layer, whose input is zero: its self-attention is
                then a constant.
            query_pos: (T, D) positions of the queries.
            memory: (B, N, D), the cross-attention's values.
            keys: (B, N, D), its keys: ``memory`` plus positions.
        """
        if x is None:
            x = self.norm1(self.dropout(self.self_attn.zero_value_output()))
            query = (x + query_pos).expand(len(memory), -1, -1)
        else:
            q = x + query_pos
            x = self.norm1(x + self.dropout(self.self_attn(q, q, x)))
            query = x + query_pos
        x = self.norm2(x + self.dropout(self.multihead_attn(query, keys, memory)))
        return self.norm3(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


def grid_positions(height: int, width: int, dim: int) -> Tensor:
    """Return (height * width, dim) sinusoidal positions of a feature map, row by row.

    One half of ``dim`` encodes y, the other half x. Each coordinate runs from 1/n to 1, times 2 pi
    (DETR, https://arxiv.org/abs/2005.12872, with ``normalize=True``, temperature 10000).
    """
    half = dim // 2
    # Compute on the CPU whatever the default device is: on "meta" torch would trace this code.
    exponent = 2 * (torch.arange(half, dtype=torch.float32, device="cpu") // 2) / half
    period = 10000.0**exponent

    def along(n: int) -> Tensor:
        coordinate = torch.arange(1, n + 1, dtype=torch.float32, device="cpu")
        angle = (coordinate / (n + 1e-6) * (2 * math.pi))[:, None] / period
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)

    y = along(height)[:, None, :].expand(-1, width, -1)
    x = along(width)[None, :, :].expand(height, -1, -1)
    return torch.cat((y, x), dim=-1).flatten(0, 1)


def sequence_positions(n: int, dim: int) -> Tensor:
    """Return (n, dim) sinusoidal positions of a sequence.

    Formula: section 3.5 of https://arxiv.org/abs/1706.03762.
    """
    exponent = 2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 10000.0**exponent
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()
