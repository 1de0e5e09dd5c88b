"""Post-norm transformer layers as ACT (and DETR) have them: positions are added to queries and keys
at every layer, never to values.

All tensors are (batch, tokens, width). Parameters have the names of ``torch.nn.Transformer*Layer``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.act.config import ActConfig


class Attention(nn.Module):
    """Multi-head attention."""

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
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """(B, Q, D), (B, K, D), (B, K, D) to (B, Q, D); ``hidden`` (B, K) bool hides keys."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if hidden is None else ~hidden[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def of_zeros(self) -> Tensor:
        """(D,): the output where all values are zero, whatever queries and keys are.

        Every projected value is then the value bias, and so is any average of them.
        """
        value_bias = self.in_proj_bias.chunk(3)[2]
        return self.out_proj(value_bias)  # type: ignore[no-any-return]


class _FeedForward(nn.Module):
    """What the two layers share: linear1, linear2, the activation, dropout."""

    def __init__(self, config: ActConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, config.width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        self.activation = F.gelu if config.activation == "gelu" else F.relu
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))  # type: ignore[no-any-return]


class EncoderLayer(_FeedForward):
    def __init__(self, config: ActConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.width, config.n_heads, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, x: Tensor, pos: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``x`` (B, N, D), ``pos`` (N, D), ``hidden`` (B, N) bool."""
        q = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, hidden)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


class DecoderLayer(_FeedForward):
    def __init__(self, config: ActConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.width, config.n_heads, config.dropout)
        self.multihead_attn = Attention(config.width, config.n_heads, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.norm3 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor | None, query_pos: Tensor, memory: Tensor, keys: Tensor) -> Tensor:
        """One layer.

        Args:
            x: (B, T, D), or None for the first layer, whose input is all zeros: its self-attention
                is then a constant.
            query_pos: (T, D).
            memory: (B, N, D), the values.
            keys: (B, N, D), ``memory`` with its positions.
        """
        if x is None:
            x = self.norm1(self.dropout(self.self_attn.of_zeros()))
            query = (x + query_pos).expand(len(memory), -1, -1)
        else:
            q = x + query_pos
            x = self.norm1(x + self.dropout(self.self_attn(q, q, x)))
            query = x + query_pos
        x = self.norm2(x + self.dropout(self.multihead_attn(query, keys, memory)))
        return self.norm3(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


def grid_positions(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim) sinusoidal positions of a feature map, rows first.

    Half of ``dim`` says where along y, half along x; each coordinate runs 1/n to 1 times 2 pi
    (DETR, https://arxiv.org/abs/2005.12872, with ``normalize=True``, temperature 10000).
    """
    half = dim // 2
    # On the CPU whatever the default device is: without memory ("meta") torch would trace this.
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
    """(n, dim) sinusoidal positions of a sequence (https://arxiv.org/abs/1706.03762, 3.5)."""
    exponent = 2 * (torch.arange(dim, dtype=torch.float64) // 2) / dim
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 10000.0**exponent
    table = torch.where(torch.arange(dim) % 2 == 0, angle.sin(), angle.cos())
    return table.float()
