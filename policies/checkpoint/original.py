"""Loads the original ACT's layout: ``policy_best.ckpt``, a bare state dict, and
``dataset_stats.pkl``.

Mobile ALOHA's act-plus-plus and Agilex's cobot_magic write it too, with a backbone for each camera.
It has neither the cameras' names nor the number of attention heads. They come from arguments, from
``metronome.yaml`` beside it, or from act-plus-plus's ``config.pkl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.act.config import ActConfig
from policies.act.weights import ActWeights
from policies.checkpoint.extras import Extras
from policies.checkpoint.file_readers import read_torch
from policies.checkpoint.original_variants import (
    BACKBONES,
    Settings,
    check_supported,
    is_agilex,
    read_settings,
    unused_names,
    with_original_names,
)
from policies.checkpoint.policy_assembly import assemble
from policies.checkpoint.safe_pickle import read_pickle
from policies.checkpoint.weight_names import detr_keys, detr_unused_keys, translate
from policies.errors import CheckpointError
from policies.normalizer import Normalizer, from_stats

STATS = "dataset_stats.pkl"
BEST = "policy_best.ckpt"


def find_weights(folder: Path) -> Path | None:
    """Return ``policy_best.ckpt``, or the only ``.ckpt`` in ``folder``, or None."""
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
    """Load the checkpoint in ``folder``; arguments win over ``extras``.

    Raises:
        CheckpointError: A file or key is missing, unknown, or not as expected.
    """
    path = find_weights(folder)
    if path is None:
        raise CheckpointError(f"{folder}: expected {BEST}, or exactly one .ckpt file")
    settings = read_settings(folder)
    tensors = read_torch(path)
    check_supported(tensors, path)
    names, heads = _names_and_heads(settings, camera_names, n_heads, extras, path)
    cameras = extras.camera_contracts(names, image_hw, path)
    agilex = is_agilex(tensors)
    tensors = with_original_names(tensors, path)
    config = _config(tensors, path, len(cameras), heads, cameras[0].model_hw)
    unused = detr_unused_keys(_count(tensors, "model.transformer.decoder.layers."))
    unused |= unused_names(tensors)
    used = {key: tensor for key, tensor in tensors.items() if key not in unused}
    stats = read_pickle(folder / STATS)
    if not isinstance(stats, dict):
        raise CheckpointError(f"{folder / STATS}: got {type(stats).__name__}, expected a dict")
    state = _normalizer(stats, "qpos", folder / STATS, config.state_dim)
    chosen = extras.action_statistics or "action"
    action = _normalizer(stats, chosen, folder / STATS, config.action_dim, output=True)
    if agilex and extras.action_statistics is None:
        _check_unambiguous(state, action, folder / STATS)
    return assemble(
        config,
        translate(used, detr_keys(config), (), config, path),
        extras,
        state=state,
        action=action,
        cameras=cameras,
        execution=None if settings is None else settings.execution,
        assumed=extras.assumed_sizes(image_hw),
    )


def _names_and_heads(
    settings: Settings | None,
    camera_names: tuple[str, ...] | None,
    n_heads: int | None,
    extras: Extras,
    path: Path,
) -> tuple[tuple[str, ...], int]:
    """Return the cameras' names and the number of heads."""
    names = extras.camera_names if camera_names is None else camera_names
    heads = extras.n_heads if n_heads is None else n_heads
    if settings is not None:
        names = settings.camera_names if names is None else names
        heads = settings.n_heads if heads is None else heads
    for what, value in (("camera_names", names), ("n_heads", heads)):
        if value is None or value == ():
            raise CheckpointError(
                f"{path}: a bare state dict does not hold {what}: give it as an argument, or in "
                f"metronome.yaml beside the checkpoint"
            )
    result = tuple(names or ()), int(heads or 0)
    if settings is not None:
        settings.check(*result)
    return result


def _check_unambiguous(state: Normalizer, action: Normalizer, path: Path) -> None:
    """Raise ``CheckpointError`` where it matters which of the two normalizes actions."""
    if state.digest() != action.digest():
        raise CheckpointError(
            f"{path}: cobot_magic normalized actions by the statistics of qpos until December "
            "2024, and by those of action since; the checkpoint does not say which: expected "
            "'action_statistics: action' or 'action_statistics: qpos' in metronome.yaml beside it"
        )


def _config(
    tensors: Mapping[str, Tensor], path: Path, n_cameras: int, n_heads: int, hw: tuple[int, int]
) -> ActConfig:
    """Return the sizes, from the weights' shapes."""
    encoder = "model.transformer.encoder.layers."
    action_dim, width = _shape(tensors, "model.action_head.weight", path)
    _, latent_dim = _shape(tensors, "model.latent_out_proj.weight", path)
    deeper = f"{BACKBONES}0.0.body.layer1.2.conv1.weight" in tensors
    backbones = _count(tensors, BACKBONES)
    if backbones > 1 and backbones != n_cameras:
        raise CheckpointError(
            f"{path}: camera_names: got {n_cameras}, expected {backbones}: each camera has a "
            "backbone of its own, in the order of the training"
        )
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
        backbone_per_camera=backbones > 1,
    )


def _shape(tensors: Mapping[str, Tensor], key: str, path: Path) -> tuple[int, int]:
    if key not in tensors:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {key}: got shape {shape}, expected two dimensions")
    return shape[0], shape[1]


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of numbered layers below ``prefix``."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    return len(numbers)


def _normalizer(
    stats: Mapping[str, Any], what: str, path: Path, dim: int, *, output: bool = False
) -> Normalizer:
    """Return a z-score that divides by the file's deviations as they are, as the original does.

    The original clips them to at least 0.01 when it computes them, before training. So the file's
    values are those that the network was trained with. A deviation of zero makes a constant of an
    action, and is refused for a state.
    """
    table = {name: stats.get(f"{what}_{name}") for name in ("mean", "std")}
    for name, value in table.items():
        if value is None:
            raise CheckpointError(f"{path}: key '{what}_{name}' is missing: no normalizer")
    normalizer = from_stats("zscore", table, min_sigma=0.0, source=f"{path}: {what}", output=output)
    if normalizer.dim != dim:
        raise CheckpointError(f"{path}: {what}: got {normalizer.dim} dimensions, expected {dim}")
    return normalizer
