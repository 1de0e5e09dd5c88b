"""Sizes of an ACT network and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from policies.errors import CheckpointError

Backbone = Literal["resnet18", "resnet34"]
Activation = Literal["relu", "gelu"]

BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
}
"""Residual blocks in each of the four stages."""
CHANNELS = (64, 128, 256, 512)
"""Output channels of the four stages."""
STRIDE = 32
"""Image pixels per feature, along one side."""
LARGEST_SIDE = 8192
LARGEST_LAYERS = 64
LARGEST = {
    "state_dim": 4096,
    "action_dim": 4096,
    "chunk_size": 16384,
    "n_cameras": 32,
    "width": 16384,
    "n_heads": 1024,
    "feedforward": 65536,
    "n_encoder_layers": LARGEST_LAYERS,
    "n_decoder_layers": LARGEST_LAYERS,
    "n_style_layers": LARGEST_LAYERS,
    "latent_dim": 4096,
}
"""Largest accepted sizes, far above any real network. They keep a damaged file's number from
causing a huge allocation, an hours-long loop, or an overflow deep inside torch.
"""


@dataclass(frozen=True, slots=True)
class ActConfig:
    """Sizes of an ACT network, named as in the paper (https://arxiv.org/abs/2304.13705).

    Attributes:
        state_dim, action_dim: Lengths of state and action.
        chunk_size: Actions per chunk.
        n_cameras: Number of cameras.
        image_hw: (height, width) of every camera's image at the network's input.
        width: Channels of a token.
        n_heads: Heads of every attention.
        feedforward: Channels of the hidden layer of every feed-forward block.
        n_encoder_layers: Layers of the transformer's encoder.
        n_decoder_layers: Decoder layers whose output is used; the original has seven but uses only
            the first.
        n_style_layers: Layers of the CVAE's style encoder, which only training needs.
        latent_dim: Length of the latent.
        dropout: Probability in training.
        backbone_per_camera: Each camera has its own backbone weights, as in Mobile ALOHA's ACT;
            otherwise all cameras share one backbone.

    Raises:
        CheckpointError: A size out of range, sizes that do not fit each other, or an unknown name.
    """

    state_dim: int
    action_dim: int
    chunk_size: int
    n_cameras: int
    image_hw: tuple[int, int]
    width: int = 512
    n_heads: int = 8
    feedforward: int = 3200
    n_encoder_layers: int = 4
    n_decoder_layers: int = 1
    n_style_layers: int = 4
    latent_dim: int = 32
    backbone: Backbone = "resnet18"
    activation: Activation = "relu"
    dropout: float = 0.1
    backbone_per_camera: bool = False

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            size = getattr(self, name)
            if not 1 <= size <= largest:
                raise CheckpointError(f"{name}: got {size}, expected 1 to {largest}")
        if not STRIDE <= min(self.image_hw) <= max(self.image_hw) <= LARGEST_SIDE:
            raise CheckpointError(
                f"image_hw: got {self.image_hw}, expected {STRIDE} to {LARGEST_SIDE} pixels a side"
            )
        if self.width % self.n_heads or self.width % 4:
            raise CheckpointError(
                f"n_heads: got {self.n_heads} for width {self.width}, expected a divisor of it "
                "(and a width divisible by 4)"
            )
        for name, choices in (
            ("backbone", get_args(Backbone)),
            ("activation", get_args(Activation)),
        ):
            if getattr(self, name) not in choices:
                raise CheckpointError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {choices}"
                )

    @property
    def backbone_names(self) -> tuple[str, ...]:
        """Names of the backbone modules in ``ActModel``: one for all cameras, or one for each."""
        if not self.backbone_per_camera:
            return ("backbone",)
        return tuple(f"backbones.{camera}" for camera in range(self.n_cameras))

    @property
    def features_hw(self) -> tuple[int, int]:
        """(height, width) of one camera's feature map."""
        height, width = self.image_hw
        return -(-height // STRIDE), -(-width // STRIDE)
