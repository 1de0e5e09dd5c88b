"""The parts of ACT that exist only in training: the CVAE's style encoder and an auxiliary task.

The style encoder compresses the demonstrated chunk to a latent, so that the decoder need not
average over different ways to do the task. Inference uses the latent's mean, zero. The auxiliary
task predicts the objects' positions from the mean image token. Inference checkpoints contain
neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from policies.act.config import ActConfig
from policies.act.model import ActModel
from policies.act.transformer import EncoderLayer, sequence_positions


class StyleEncoder(nn.Module):
    """Encodes a state and a chunk of actions as the mean and log-variance of a latent."""

    positions: Tensor

    def __init__(self, config: ActConfig) -> None:
        super().__init__()
        width = config.width
        self.cls = nn.Embedding(1, width)
        self.state_proj = nn.Linear(config.state_dim, width)
        self.action_proj = nn.Linear(config.action_dim, width)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_style_layers))
        self.out_proj = nn.Linear(width, 2 * config.latent_dim)
        table = sequence_positions(2 + config.chunk_size, width)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, state: Tensor, actions: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            state: (B, S).
            actions: (B, T, A).
            padded: (B, T) bool, True after the episode's end.

        Returns:
            Mean and log-variance, each (B, L).
        """
        batch = len(state)
        head = torch.stack((self.cls.weight.expand(batch, -1), self.state_proj(state)), 1)
        x = torch.cat((head, self.action_proj(actions)), 1)
        key_padding_mask = torch.cat((padded.new_zeros(batch, 2), padded), 1)
        for layer in self.layers:
            x = layer(x, self.positions, key_padding_mask)
        mean, log_variance = self.out_proj(x[:, 0]).chunk(2, -1)
        return mean, log_variance


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalar losses: mean absolute error of the actions, KL divergence, and auxiliary error."""

    l1: Tensor
    kl: Tensor
    aux: Tensor


class ActCvae(nn.Module):
    """``ActModel`` with the parts that only training needs.

    Args:
        config: Sizes.
        objects_dim: Outputs of the auxiliary task, 0 for none.
        style: Whether to have a style encoder; without it the latent is always zero.
    """

    def __init__(self, config: ActConfig, *, objects_dim: int = 0, style: bool = True) -> None:
        super().__init__()
        self.model = ActModel(config)
        self.style = StyleEncoder(config) if style else None
        self.aux_head = nn.Linear(config.width, objects_dim) if objects_dim else None

    def forward(
        self, images: Tensor, state: Tensor, actions: Tensor, padded: Tensor, objects: Tensor
    ) -> Losses:
        """Return the losses of a batch; all but ``images`` and ``padded`` are normalized.

        Args:
            images: (B, N, H, W, 3) uint8.
            state: (B, S).
            actions: (B, T, A).
            padded: (B, T) bool, True after the episode's end.
            objects: (B, objects_dim).
        """
        zero = state.new_zeros(())
        latent, kl = None, zero
        if self.style is not None:
            mean, log_variance = self.style(state, actions, padded)
            latent = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
            kl = kl_divergence(mean, log_variance)
        tokens = self.model.image_tokens(images)
        predicted = self.model.act(tokens, state, latent)
        valid = (~padded).unsqueeze(-1)
        errors = (predicted - actions).abs() * valid
        l1 = errors.sum() / (valid.sum() * actions.shape[-1])
        aux = zero
        if self.aux_head is not None:
            aux = (self.aux_head(tokens.mean(1)) - objects).abs().mean()
        return Losses(l1, kl, aux)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of N(mean, exp(log_variance)) from N(0, 1).

    ``mean`` and ``log_variance`` are (B, L); the result is summed over L and averaged over B.
    Formula: https://arxiv.org/abs/1312.6114, appendix B.
    """
    each = -0.5 * (1 + log_variance - mean.square() - log_variance.exp())
    return each.sum(-1).mean()


def checkpoint_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``ActCvae.state_dict()`` to a checkpoint's names: ``ActModel``'s and ``style.*``."""
    return {
        key.removeprefix("model."): tensor
        for key, tensor in state.items()
        if not key.startswith("aux_head.") and not key.endswith(".num_batches_tracked")
    }
