"""ACT: images and joint state in, a chunk of actions out (https://arxiv.org/abs/2304.13705).

This module defines the one weight layout: loaders convert other layouts to it, and the trainer
writes from it. Faster engines are compared with this network, so the code stays plain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from policies.act.backbone import Backbone
from policies.act.config import CHANNELS, ActConfig
from policies.act.transformer import DecoderLayer, EncoderLayer, grid_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""(r, g, b) mean of ImageNet's images, scaled to [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""(r, g, b) standard deviation of ImageNet's images, scaled to [0, 1]."""

LATENT, STATE = 0, 1
"""Rows of ``token_pos``, and the first two tokens of the encoder."""


class ActModel(nn.Module):
    """The network without the CVAE's style encoder.

    Args:
        config: Sizes.
        image_mean, image_std: (r, g, b) for each camera, of images scaled to [0, 1].
        folded: Batch-norm is already folded into the convolutions: inference only.
    """

    image_mean: Tensor
    image_std: Tensor
    image_pos: Tensor

    def __init__(
        self,
        config: ActConfig,
        *,
        image_mean: Sequence[Sequence[float]] | None = None,
        image_std: Sequence[Sequence[float]] | None = None,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.backbone_per_camera:
            self.backbones = nn.ModuleList(
                Backbone(config.backbone, folded=folded) for _ in range(config.n_cameras)
            )
        else:
            self.backbone = Backbone(config.backbone, folded=folded)
        self.image_proj = nn.Conv2d(CHANNELS[-1], width, 1)
        self.state_proj = nn.Linear(config.state_dim, width)
        self.latent_proj = nn.Linear(config.latent_dim, width)
        self.token_pos = nn.Embedding(2, width)
        self.query_pos = nn.Embedding(config.chunk_size, width)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.action_head = nn.Linear(width, config.action_dim)
        constants = {
            "image_mean": torch.tensor(image_mean or [IMAGENET_MEAN] * config.n_cameras),
            "image_std": torch.tensor(image_std or [IMAGENET_STD] * config.n_cameras),
            "image_pos": grid_positions(*config.features_hw, width).repeat(config.n_cameras, 1),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def normalize_images(self, images: Tensor) -> Tensor:
        """(B, N, H, W, 3) uint8 to (B * N, 3, H, W), still channels last in memory."""
        mean, std = (x[None, :, None, None, :] for x in (self.image_mean, self.image_std))
        scaled = (images.to(mean.dtype) / 255 - mean) / std
        return scaled.flatten(0, 1).permute(0, 3, 1, 2).to(self.image_proj.weight.dtype)

    def features(self, pictures: Tensor) -> Tensor:
        """(B * N, 3, H, W) normalized to (B * N, 512, h, w).

        Cameras that share a backbone are one batch.
        """
        if not self.config.backbone_per_camera:
            return self.backbone(pictures)  # type: ignore[no-any-return]
        n = self.config.n_cameras
        features = [backbone(pictures[camera::n]) for camera, backbone in enumerate(self.backbones)]
        return torch.stack(features, 1).flatten(0, 1)

    def image_tokens(self, images: Tensor) -> Tensor:
        """(B, N, H, W, 3) uint8 to (B, N * h * w, D), camera by camera."""
        features = self.image_proj(self.features(self.normalize_images(images)))
        tokens = features.flatten(2).transpose(1, 2)
        return tokens.reshape(len(images), -1, self.config.width)  # type: ignore[no-any-return]

    def forward(self, images: Tensor, state: Tensor, latent: Tensor | None = None) -> Tensor:
        """(B, N, H, W, 3) uint8 and (B, S) normalized state to (B, T, A) normalized actions.

        ``latent`` (B, L) is the style; None is zero, as in inference.
        """
        return self.act(self.image_tokens(images), state, latent)

    def act(self, image_tokens: Tensor, state: Tensor, latent: Tensor | None = None) -> Tensor:
        """As ``forward``, from the images' tokens (B, N * h * w, D)."""
        batch = len(state)
        if latent is None:
            style = self.latent_proj.bias.expand(batch, -1)
        else:
            style = self.latent_proj(latent)
        x = torch.cat((torch.stack((style, self.state_proj(state)), 1), image_tokens), 1)
        pos = torch.cat((self.token_pos.weight, self.image_pos))
        for layer in self.encoder:
            x = layer(x, pos)
        keys, queries = x + pos, None
        for layer in self.decoder:
            queries = layer(queries, self.query_pos.weight, x, keys)
        return self.action_head(self.decoder_norm(queries))  # type: ignore[no-any-return]
