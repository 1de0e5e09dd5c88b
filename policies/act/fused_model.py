"""The network as engines run it, with all constants precomputed by ``policies.act.weight_fusion``.

It is plain torch, for any device and number format. ``ActModel`` is the readable reference; both
give the same actions. All token tensors are (batch, tokens, width).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.act.config import ActConfig

BLOCK_CHANNELS = 16
"""Channels of ``space_to_depth``: 12 and zeros, because tensor cores take multiples of 8."""


def space_to_depth(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Arrange blocks of 2 x 2 pixels as channels, for a convolution with half the stride.

    A 7 x 7 convolution with stride 2 and padding 3 of 3 channels is one of 4 x 4 with stride 1 and
    no padding of these: an 8 x 8 kernel with a first row and column of zeros, in blocks of 2 x 2.

    Args:
        x: (..., H, W, 3) of any dtype.
        dtype: Of the result.

    Returns:
        (..., ceil(H / 2) + 3, ceil(W / 2) + 3, ``BLOCK_CHANNELS``), with the padding: two blocks of
        zeros before, one after. The channels are row and column in the block and colour.
    """
    height, width = x.shape[-3:-1]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    rows, columns = x.shape[-3] // 2, x.shape[-2] // 2
    x = x.reshape(*x.shape[:-3], rows, 2, columns, 2, 3).transpose(-4, -3)
    x = x.to(dtype, memory_format=torch.contiguous_format).flatten(-3)
    return F.pad(x, (0, BLOCK_CHANNELS - x.shape[-1], 2, 1, 2, 1))


class FusedBlock(nn.Module):
    """A residual block with batch-norm folded into the convolutions.

    Args:
        conv1, conv2: The 3x3 convolutions.
        downsample: Convolution of the skip connection; None for an identity.
    """

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d, downsample: nn.Conv2d | None) -> None:
        super().__init__()
        self.conv1, self.conv2, self.downsample = conv1, conv2, downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same with the block's channels and stride."""
        y = self.conv2(self.conv1(x).relu_())
        return y.add_(x if self.downsample is None else self.downsample(x)).relu_()  # type: ignore[no-any-return]


class FusedBackbone(nn.Module):
    """The convolutions for the images of one camera, or of all cameras.

    Args:
        stem: The first convolution.
        blocks: All residual blocks, first to last.
    """

    def __init__(self, stem: nn.Conv2d, blocks: Sequence[FusedBlock]) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), channels last, to (B, 512, h, w); C is 3, or as ``space_to_depth``."""
        # The maximum of the rectified values is the rectified maximum, of a quarter of the values.
        x = F.max_pool2d(self.stem(x), 3, stride=2, padding=1).relu_()
        for block in self.blocks:
            x = block(x)
        return x


class FusedAttention(nn.Module):
    """Attention with one projection and one table of constants for everything computed from ``x``.

    Args:
        n_heads: Heads.
        project: Queries, keys and values of ``x`` (D to 3D), or only keys and values (D to 2D).
        table: (tokens, 3D or 2D), the contribution of positions and biases, which is added to it.
        out: D to D; its bias contains the contribution of the values' bias.
    """

    table: Tensor

    def __init__(self, n_heads: int, project: nn.Linear, table: Tensor, out: nn.Linear) -> None:
        super().__init__()
        self.n_heads, self.project, self.out = n_heads, project, out
        self.register_buffer("table", table)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Attend to ``x`` (B, tokens, D).

        Args:
            query: (B, T, D) projected queries; those of ``x`` where None.

        Returns:
            (B, T, D).
        """
        projected = self.project(x) + self.table
        parts = projected.split(self.out.in_features, dim=-1)
        if query is not None:
            parts = (query, *parts)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FusedFeedForward(nn.Module):
    """norm(x + linear2(activation(linear1(x))))."""

    def __init__(
        self, linear1: nn.Linear, linear2: nn.Linear, norm: nn.LayerNorm, *, gelu: bool
    ) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm, self.gelu = linear1, linear2, norm, gelu

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, D) to (B, tokens, D)."""
        hidden = self.linear1(x)
        hidden = F.gelu(hidden) if self.gelu else hidden.relu_()
        return self.norm(self.linear2(hidden).add_(x))  # type: ignore[no-any-return]


class FusedEncoderLayer(nn.Module):
    """An encoder layer: self-attention and feed-forward, each with a skip connection and a norm."""

    def __init__(
        self, attention: FusedAttention, norm: nn.LayerNorm, feed_forward: FusedFeedForward
    ) -> None:
        super().__init__()
        self.attention, self.norm, self.feed_forward = attention, norm, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, D) to (B, tokens, D)."""
        return self.feed_forward(self.norm(self.attention(x).add_(x)))  # type: ignore[no-any-return]


class FirstDecoderLayer(nn.Module):
    """The decoder layer whose input is zero.

    Its queries are constants. The bias of ``cross.out`` contains what its self-attention would add.

    Args:
        query: (T, D) projected queries of the cross-attention.
        cross: Cross-attention to the memory.
        norm: After the cross-attention.
        feed_forward: With its own norm.
    """

    query: Tensor

    def __init__(
        self,
        query: Tensor,
        cross: FusedAttention,
        norm: nn.LayerNorm,
        feed_forward: FusedFeedForward,
    ) -> None:
        super().__init__()
        self.cross, self.norm, self.feed_forward = cross, norm, feed_forward
        self.register_buffer("query", query)

    def forward(self, memory: Tensor) -> Tensor:
        """``memory`` (B, tokens, D) to (B, T, D)."""
        query = self.query.expand(len(memory), -1, -1)
        return self.feed_forward(self.norm(self.cross(memory, query)))  # type: ignore[no-any-return]


class LaterDecoderLayer(nn.Module):
    """A decoder layer after the first.

    Args:
        attention: Self-attention.
        norm1: After the self-attention.
        query: The cross-attention's queries, D to D.
        query_table: (T, D), the contribution of positions and biases to them.
        cross: Cross-attention to the memory.
        norm2: After the cross-attention.
        feed_forward: With its own norm.
    """

    query_table: Tensor

    def __init__(
        self,
        *,
        attention: FusedAttention,
        norm1: nn.LayerNorm,
        query: nn.Linear,
        query_table: Tensor,
        cross: FusedAttention,
        norm2: nn.LayerNorm,
        feed_forward: FusedFeedForward,
    ) -> None:
        super().__init__()
        self.attention, self.norm1, self.query, self.cross = attention, norm1, query, cross
        self.norm2, self.feed_forward = norm2, feed_forward
        self.register_buffer("query_table", query_table)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``x`` (B, T, D) and ``memory`` (B, tokens, D) to (B, T, D)."""
        x = self.norm1(self.attention(x).add_(x))
        attended = self.cross(memory, self.query(x) + self.query_table)
        return self.feed_forward(self.norm2(attended.add_(x)))  # type: ignore[no-any-return]


class FusedAct(nn.Module):
    """(B, N, H, W, 3) uint8 and normalized state to actions in physical units. Inference only.

    Use ``set_dtype`` instead of ``to(dtype)``: images, the last norm, the action head and the
    conversion to physical units stay in float32.

    Args:
        config: Sizes.
        pixel_mean: (N, 1, 1, 3), subtracted from images of 0 to 255.
        pixel_scale: (N, 1, 1, 3), factor after that; None for 1.
        backbones: One for all cameras, or one for each.
        image_proj: 512 to D.
        style_token: (D,), the token of a zero latent.
        state_proj: S to D.
        encoder: The encoder's layers.
        first, later: The decoder's layers.
        norm: After the decoder.
        action_head: D to A, in the network's units.
        action_scale, action_shift: (A,) map from those to physical units.
        action_limits: (A,) lowest and highest action of the normalizer; None for no limits.
        space_to_depth: The first convolutions take ``space_to_depth`` of the images.
    """

    pixel_mean: Tensor
    pixel_scale: Tensor | None
    style_token: Tensor
    action_scale: Tensor
    action_shift: Tensor
    action_lower: Tensor | None
    action_upper: Tensor | None

    def __init__(
        self,
        config: ActConfig,
        *,
        pixel_mean: Tensor,
        pixel_scale: Tensor | None,
        backbones: Sequence[FusedBackbone],
        image_proj: nn.Linear,
        style_token: Tensor,
        state_proj: nn.Linear,
        encoder: Sequence[FusedEncoderLayer],
        first: FirstDecoderLayer,
        later: Sequence[LaterDecoderLayer],
        norm: nn.LayerNorm,
        action_head: nn.Linear,
        action_scale: Tensor,
        action_shift: Tensor,
        action_limits: tuple[Tensor, Tensor] | None,
        space_to_depth: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.space_to_depth = space_to_depth
        self.image_proj, self.state_proj = image_proj, state_proj
        self.backbones, self.encoder = nn.ModuleList(backbones), nn.ModuleList(encoder)
        self.first, self.later = first, nn.ModuleList(later)
        self.norm, self.action_head = norm, action_head
        lower, upper = action_limits or (None, None)
        buffers = {
            "pixel_mean": pixel_mean,
            "pixel_scale": pixel_scale,
            "style_token": style_token,
            "action_scale": action_scale,
            "action_shift": action_shift,
            "action_lower": lower,
            "action_upper": upper,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the convolutions and the transformer."""
        return self.image_proj.weight.dtype

    def set_dtype(self, dtype: torch.dtype) -> FusedAct:
        """Compute the convolutions and the transformer in ``dtype``; return self."""
        for module in (self.backbones, self.image_proj, self.state_proj, self.encoder):
            module.to(dtype=dtype)
        self.first.to(dtype=dtype)
        self.later.to(dtype=dtype)
        self.style_token = self.style_token.to(dtype)
        return self

    def forward(self, images: Tensor, state: Tensor) -> Tensor:
        """(B, N, H, W, 3) uint8, (B, S) float32 normalized, to (B, T, A) float32 physical."""
        return self.transform(self.features(images), state)

    def transform(self, features: Tensor, state: Tensor) -> Tensor:
        """As ``forward``, from ``features`` of the images: all but the convolutions."""
        memory = self.tokens(features, state)
        for layer in self.encoder:
            memory = layer(memory)
        y = self.first(memory)
        for layer in self.later:
            y = layer(y, memory)
        return self.physical(self.action_head(self.norm(y.float())))

    def tokens(self, features: Tensor, state: Tensor) -> Tensor:
        """Return (B, 2 + N * h * w, D): style, state, and the images' features in memory order."""
        image_tokens = self.image_proj(features.permute(0, 2, 3, 1).flatten(1, 2))
        image_tokens = image_tokens.reshape(len(state), -1, self.config.width)
        style = self.style_token.expand(len(state), 1, -1)
        state_token = self.state_proj(state.to(self.dtype)).unsqueeze(1)
        return torch.cat((style, state_token, image_tokens), 1)

    def features(self, images: Tensor) -> Tensor:
        """Return (B * N, 512, h, w), channels last.

        Cameras that share a backbone are one batch; otherwise they run one after another.
        """
        x = images - self.pixel_mean
        if self.pixel_scale is not None:
            x *= self.pixel_scale
        if self.space_to_depth:
            x = space_to_depth(x, self.dtype)
        x = x.permute(0, 1, 4, 2, 3).to(self.dtype)
        if not self.config.backbone_per_camera:
            return self.backbones[0](x.flatten(0, 1))  # type: ignore[no-any-return]
        # Stack them channels last, their memory order, so that the next reshape copies nothing.
        rows = [
            backbone(pictures).permute(0, 2, 3, 1)
            for backbone, pictures in zip(self.backbones, x.unbind(1), strict=True)
        ]
        return torch.stack(rows, 1).flatten(0, 1).permute(0, 3, 1, 2)

    def physical(self, normalized: Tensor) -> Tensor:
        """Convert the network's units to physical units, within the normalizer's limits."""
        actions = torch.addcmul(self.action_shift, normalized, self.action_scale)
        if self.action_lower is not None:
            actions = torch.clamp(actions, self.action_lower, self.action_upper)
        return actions
