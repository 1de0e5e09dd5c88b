"""The original ACT's layout: ``policy_best.ckpt``, a bare state dict, and ``dataset_stats.pkl``.

It says neither the cameras' names nor the number of attention heads: they come from the user, by
arguments or by ``metronome.yaml`` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.act.config import ActConfig
from policies.act.weights import ActWeights
from policies.checkpoint.assemble import assemble
from policies.checkpoint.extras import Extras
from policies.checkpoint.files import read_torch
from policies.checkpoint.keys import detr_dead_keys, detr_keys, translate
from policies.checkpoint.pickles import read_pickle
from policies.errors import CheckpointError
from policies.normalize import Normalizer, from_stats

STATS = "dataset_stats.pkl"
BEST = "policy_best.ckpt"


def find_weights(folder: Path) -> Path | None:
    """``policy_best.ckpt``, or the only ``.ckpt`` in ``folder``."""
    if (folder / BEST).is_file():
        return folder / BEST
    others = sorted(folder.glob("*.ckpt"))
    return others[0] if len(others) == 1 else None


def load_original(
    folder: Path,
    extras: Extras,
    *,
    camera_names: tuple[str, ...] | None = None,
    n_heads: int | None = None,
    image_hw: tuple[int, int] | None = None,
) -> ActWeights:
    """The checkpoint in ``folder``; arguments win over ``extras``.

    Raises:
        CheckpointError: Anything missing, unknown, or not as expected.
    """
    path = find_weights(folder)
    if path is None:
        raise CheckpointError(f"{folder}: expected {BEST}, or exactly one .ckpt file")
    tensors = read_torch(path)
    names = camera_names or extras.camera_names
    heads = n_heads or extras.n_heads
    for what, value in (("camera_names", names), ("n_heads", heads)):
        if not value:
            raise CheckpointError(
                f"{path}: a bare state dict does not hold {what}: give it as an argument, or in "
                f"metronome.yaml beside the checkpoint"
            )
    cameras = extras.camera_contracts(tuple(names or ()), image_hw, path)
    config = _config(tensors, path, len(cameras), int(heads or 0), cameras[0].model_hw)
    layers = _count(tensors, "model.transformer.decoder.layers.")
    stats = read_pickle(folder / STATS)
    if not isinstance(stats, dict):
        raise CheckpointError(f"{folder / STATS}: got {type(stats).__name__}, expected a dict")
    return assemble(
        config,
        translate(tensors, detr_keys(config), detr_dead_keys(layers), config, path),
        extras,
        state=_normalizer(stats, "qpos", folder / STATS, config.state_dim),
        action=_normalizer(stats, "action", folder / STATS, config.action_dim),
        cameras=cameras,
    )


def _config(
    tensors: Mapping[str, Tensor], path: Path, n_cameras: int, n_heads: int, hw: tuple[int, int]
) -> ActConfig:
    """Sizes, from the weights' shapes."""
    encoder = "model.transformer.encoder.layers."
    action_dim, width = _shape(tensors, "model.action_head.weight", path)
    _, latent_dim = _shape(tensors, "model.latent_out_proj.weight", path)
    deeper = "model.backbones.0.0.body.layer1.2.conv1.weight" in tensors
    return ActConfig(
        state_dim=_shape(tensors, "model.input_proj_robot_state.weight", path)[1],
        action_dim=action_dim,
        chunk_size=_shape(tensors, "model.query_embed.weight", path)[0],
        n_cameras=n_cameras,
        image_hw=hw,
        width=width,
        n_heads=n_heads,
        feedforward=_shape(tensors, f"{encoder}0.linear1.weight", path)[0],
        n_encoder_layers=_count(tensors, encoder),
        n_style_layers=max(1, _count(tensors, "model.encoder.layers.")),
        latent_dim=latent_dim,
        backbone="resnet34" if deeper else "resnet18",
    )


def _shape(tensors: Mapping[str, Tensor], key: str, path: Path) -> tuple[int, int]:
    if key not in tensors:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {key}: got shape {shape}, expected two dimensions")
    return shape[0], shape[1]


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers there are below ``prefix``."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    return len(numbers)


def _normalizer(stats: Mapping[str, Any], what: str, path: Path, dim: int) -> Normalizer:
    """Divides by the file's deviations as they are, as the original does.

    It clips them to at least 0.01 when it computes them, before it trains; whatever the file says
    is what the network learned with. Zero is refused.
    """
    table = {name: stats.get(f"{what}_{name}") for name in ("mean", "std")}
    for name, value in table.items():
        if value is None:
            raise CheckpointError(f"{path}: key '{what}_{name}' is missing: no normalizer")
    normalizer = from_stats("zscore", table, min_sigma=0.0, source=f"{path}: {what}")
    if normalizer.dim != dim:
        raise CheckpointError(f"{path}: {what}: got {normalizer.dim} dimensions, expected {dim}")
    return normalizer
