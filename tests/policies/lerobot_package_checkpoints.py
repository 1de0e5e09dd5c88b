"""Checkpoints of LeRobot with random weights; imported where ``lerobot`` is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import (
    get_policy_class,
    make_policy_config,
    make_pre_post_processors,
)

CAMERAS = {"top": (96, 96), "wrist": (96, 96)}
JOINTS = 14

SMALL: dict[str, dict[str, Any]] = {
    "act": {
        "chunk_size": 20, "n_action_steps": 8, "dim_model": 64, "n_heads": 4,
        "dim_feedforward": 64, "n_encoder_layers": 1, "n_vae_encoder_layers": 1,
        "latent_dim": 8,
    },
    "diffusion": {
        "horizon": 16, "n_action_steps": 6, "down_dims": (32, 64), "crop_shape": (84, 84),
        "spatial_softmax_num_keypoints": 8, "diffusion_step_embed_dim": 16,
        "num_train_timesteps": 10,
    },
    "vqbet": {
        "crop_shape": (84, 84), "spatial_softmax_num_keypoints": 8, "vqvae_embedding_dim": 32,
        "vqvae_enc_hidden_dim": 32, "gpt_input_dim": 32, "gpt_output_dim": 32, "gpt_n_layer": 2,
        "gpt_n_head": 2, "gpt_hidden_dim": 32,
    },
}  # fmt: skip


def features(cameras: dict[str, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, *hw))
        for name, hw in cameras.items()
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (JOINTS,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (JOINTS,))}


def statistics(cameras: dict[str, tuple[int, int]]) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    vectors = {}
    for name in ("observation.state", "action"):
        low = -1 - torch.rand(JOINTS, generator=generator)
        high = 1 + torch.rand(JOINTS, generator=generator)
        vectors[name] = {"mean": (low + high) / 2, "std": (high - low) / 4, "min": low, "max": high}
    images = {
        f"observation.images.{name}": {
            "mean": torch.rand(3, 1, 1, generator=generator),
            "std": 0.2 + torch.rand(3, 1, 1, generator=generator) / 5,
            "min": torch.zeros(3, 1, 1),
            "max": torch.ones(3, 1, 1),
        }
        for name in cameras
    }
    return {**vectors, **images}


def make_checkpoint(kind: str, folder: Path, **changes: Any) -> Path:
    """Write a checkpoint of LeRobot's policy ``kind`` with its processors."""
    cameras = {"top": (96, 96)} if kind == "vqbet" else changes.pop("cameras", CAMERAS)
    inputs, outputs = features(cameras)
    config = make_policy_config(
        kind,
        input_features=inputs,
        output_features=outputs,
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
        **{**SMALL[kind], **changes},
    )
    torch.manual_seed(1)
    policy = get_policy_class(kind)(config)
    policy.save_pretrained(folder)
    for pipeline in make_pre_post_processors(config, dataset_stats=statistics(cameras)):
        pipeline.save_pretrained(folder)
    return folder
