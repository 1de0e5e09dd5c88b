"""Loads LeRobot's two layouts.

The current one has normalization in processor files; the older one in buffers among the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.act.config import ActConfig
from policies.act.weights import ActWeights
from policies.checkpoint.extras import Extras
from policies.checkpoint.file_readers import need, read_weights
from policies.checkpoint.lerobot_config import (
    ACTION,
    STATE,
    Features,
    camera_name,
    read_config,
    read_features,
)
from policies.checkpoint.lerobot_processor import (
    POSTPROCESSOR,
    PREPROCESSOR,
    Processors,
    read_processors,
)
from policies.checkpoint.lerobot_stats import Statistics
from policies.checkpoint.policy_assembly import assemble
from policies.checkpoint.weight_folders import WEIGHTS
from policies.checkpoint.weight_names import (
    LEROBOT_RENAMED_KEYS,
    LEROBOT_UNUSED_KEYS,
    lerobot_keys,
    translate,
)
from policies.errors import CheckpointError
from policies.execution import Execution

CONFIG = "config.json"
BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
"""Prefixes of the older layout's buffers."""


def load_lerobot(
    folder: Path, extras: Extras, *, image_hw: tuple[int, int] | None = None
) -> ActWeights:
    """Load the checkpoint in ``folder``.

    Raises:
        CheckpointError: A file or key is missing, unknown, or not as expected.
    """
    path = folder / CONFIG
    raw = read_config(path)
    features = read_features(raw, path)
    # Statistics among the weights may be infinite where unused: LeRobot initializes them so.
    tensors = read_weights(folder, unchecked=BUFFERS)
    raw.setdefault("n_vae_encoder_layers", _count(tensors, "model.vae_encoder.layers."))
    processors = _processors(folder, raw, tensors, path)
    names = tuple(map(camera_name, robot_features(features.images, processors.rename, folder)))
    size = image_hw or (None if extras.cameras or extras.image_hw else features.image_hw)
    cameras = extras.camera_contracts(names, size, path)
    config = _config(raw, path, features, len(cameras), cameras[0].model_hw)
    weights = {
        LEROBOT_RENAMED_KEYS.get(k, k): v for k, v in tensors.items() if not k.startswith(BUFFERS)
    }
    steps, execution = read_execution(raw, config.chunk_size, path)
    loaded = assemble(
        config,
        translate(weights, lerobot_keys(config), LEROBOT_UNUSED_KEYS, config, folder / WEIGHTS),
        extras,
        state=processors.inputs.normalizer(STATE, config.state_dim),
        action=processors.outputs.normalizer(ACTION, config.action_dim),
        cameras=cameras,
        image_norm=processors.inputs.image_norm(features.images),
        n_action_steps=steps,
        execution=execution,
    )
    if processors.action_names and not loaded.action_names:
        loaded = dataclasses.replace(loaded, action_names=processors.action_names)
    return loaded


def read_execution(raw: Mapping[str, Any], chunk_size: int, path: Path) -> tuple[int, Execution]:
    """Return ``n_action_steps`` for a strategy that executes chunks one after another, and the
    checkpoint's strategy.

    With a temporal ensemble LeRobot requires ``n_action_steps`` 1, which then means to re-plan
    every tick. Nothing but the chunk size is known then for another strategy of the user.
    """
    key, coefficient = "temporal_ensemble_coeff", raw.get("temporal_ensemble_coeff")
    steps = need(raw, "n_action_steps", int, path)
    if not 1 <= steps <= chunk_size:
        raise CheckpointError(
            f"{path}: n_action_steps: got {steps}, expected 1 to chunk_size = {chunk_size}"
        )
    if coefficient is None:
        return steps, Execution("sequential", None, steps, f"{CONFIG}: n_action_steps")
    if steps != 1:
        raise CheckpointError(f"{path}: n_action_steps: got {steps}, expected 1 with {key}")
    coefficient = float(need(raw, key, (int, float), path))
    try:
        return chunk_size, Execution("temporal_ensemble", coefficient, 1, f"{CONFIG}: {key}")
    except ValueError as error:
        raise CheckpointError(f"{path}: {key}: {error}") from error


def _config(
    raw: Mapping[str, Any], path: Path, features: Features, n_cameras: int, hw: tuple[int, int]
) -> ActConfig:
    expected = {
        "n_obs_steps": 1,
        "pre_norm": False,
        "replace_final_stride_with_dilation": False,
    }
    for key, value in expected.items():
        if raw.get(key, value) not in (value, 0 if value is False else value):
            raise CheckpointError(f"{path}: {key}: got {raw[key]!r}, expected {value!r}")
    try:
        return ActConfig(
            state_dim=features.state_dim,
            action_dim=features.action_dim,
            chunk_size=need(raw, "chunk_size", int, path),
            n_cameras=n_cameras,
            image_hw=hw,
            width=need(raw, "dim_model", int, path),
            n_heads=need(raw, "n_heads", int, path),
            feedforward=need(raw, "dim_feedforward", int, path),
            n_encoder_layers=need(raw, "n_encoder_layers", int, path),
            n_decoder_layers=need(raw, "n_decoder_layers", int, path),
            n_style_layers=need(raw, "n_vae_encoder_layers", int, path),
            latent_dim=need(raw, "latent_dim", int, path),
            backbone=need(raw, "vision_backbone", str, path),
            activation=raw.get("feedforward_activation", "relu"),
        )
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(path) in text else f"{path}: {text}") from error


def _processors(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> Processors:
    """Read the processor files, or the older layout's statistics among the weights."""
    if (folder / PREPROCESSOR).is_file() or (folder / POSTPROCESSOR).is_file():
        return read_processors(folder)
    modes = need(raw, "normalization_mapping", dict, path)
    normalized = any(mode != "IDENTITY" for mode in modes.values())
    if normalized and not any(key.startswith(BUFFERS) for key in tensors):
        raise CheckpointError(
            f"{folder}: no normalizer: neither {PREPROCESSOR} nor normalize_inputs.* in {WEIGHTS}"
        )
    types = {name: feature["type"] for name, feature in raw["input_features"].items()}
    inputs, outputs = (
        Statistics(
            tensors=tensors,
            source=folder / WEIGHTS,
            modes=modes,
            modes_source=path,
            types=types,
            buffers=buffers,
        )
        for buffers in ("normalize_inputs", "unnormalize_outputs")
    )
    return Processors({}, inputs, outputs, ())


def robot_features(
    features: tuple[str, ...], rename: Mapping[str, str], folder: Path
) -> tuple[str, ...]:
    """Return the robot's names of the policy's images, and of its state where that is among them.

    Raises:
        CheckpointError: Two of the robot's become one of the policy's, or one is renamed away.
    """
    path = folder / PREPROCESSOR
    sources: dict[str, str] = {}
    for robot_name, policy_name in rename.items():
        if policy_name in sources:
            raise CheckpointError(
                f"{path}: rename_map: got both {sources[policy_name]!r} and {robot_name!r} for "
                f"{policy_name!r}, expected one"
            )
        sources[policy_name] = robot_name
    for needed in (*features, STATE):
        if needed in rename and needed not in sources:
            raise CheckpointError(
                f"{path}: rename_map: {needed!r} becomes {rename[needed]!r}, and nothing becomes "
                f"{needed!r}, which the policy needs"
            )
    found = tuple(sources.get(feature, feature) for feature in features)
    names = [camera_name(feature) for feature in found]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path}: got cameras {names}, expected different names")
    return found


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of numbered layers below ``prefix``; at least 1, a valid size."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    return max(1, len(numbers))
