"""Reads LeRobot's ``config.json``: refuses unknown keys and returns the network's inputs and
outputs.

The keys are those of LeRobot's releases up to 0.6.1. Its first generation (2024) had other keys for
features and normalization, which are converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.checkpoint.file_readers import need, read_json
from policies.errors import CheckpointError

IMAGES = "observation.images."
STATE = "observation.state"
ACTION = "action"
STATISTICS = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""Modes of normalization and the two statistics that each needs."""
MODES = (*STATISTICS, "IDENTITY")
FEATURE_TYPES = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")

OLD_FEATURE_KEYS = {
    "input_shapes": "input_features",
    "output_shapes": "output_features",
}
"""Keys of the first generation to today's."""
OLD_MODE_KEYS = {"input_normalization_modes", "output_normalization_modes"}
REMOVED_KEYS = ("use_temporal_aggregation", "temporal_ensemble_momentum")
NETWORK = {
    "type",
    "n_obs_steps",
    "input_features",
    "output_features",
    "normalization_mapping",
    "vision_backbone",
    "replace_final_stride_with_dilation",
    "pre_norm",
    "dim_model",
    "n_heads",
    "dim_feedforward",
    "feedforward_activation",
    "n_encoder_layers",
    "n_decoder_layers",
    "latent_dim",
    "n_vae_encoder_layers",
    "use_vae",
    "use_peft",
}
EXECUTION = {"chunk_size", "n_action_steps", "temporal_ensemble_coeff"}
TRAINING = {
    "pretrained_backbone_weights",
    "dropout",
    "kl_weight",
    "optimizer_lr",
    "optimizer_weight_decay",
    "optimizer_lr_backbone",
}
"""Keys that have no effect on a trained network."""
DEPLOYMENT = {
    "device",
    "use_amp",
    "push_to_hub",
    "repo_id",
    "private",
    "tags",
    "license",
    "pretrained_path",
    "pretrained_revision",
}
"""Keys about where the policy runs and is published; ``--device`` and ``--precision`` set that."""
KNOWN = NETWORK | EXECUTION | TRAINING | DEPLOYMENT


@dataclass(frozen=True, slots=True)
class Features:
    """Inputs and outputs of the network.

    Attributes:
        images: Names of the image features, in the order of the network's inputs.
        image_hw: (height, width) of all of them.
        state_dim, action_dim: Lengths of state and action.
    """

    images: tuple[str, ...]
    image_hw: tuple[int, int]
    state_dim: int
    action_dim: int


def is_lerobot(raw: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is LeRobot's."""
    return not {"type", "input_features", *OLD_FEATURE_KEYS}.isdisjoint(raw)


def read_config(path: Path) -> dict[str, Any]:
    """Return ``config.json`` with today's keys, all of which are known.

    Raises:
        CheckpointError: A policy other than ACT, an unknown key, a value that LeRobot refuses.
    """
    raw = read_json(path)
    if not OLD_FEATURE_KEYS.keys().isdisjoint(raw):
        raw = _convert_old_keys(raw, path)
    # Some versions of LeRobot do not write the type. Keys of other policies are refused below.
    kind = need({"type": "act", **raw}, "type", str, path)
    if kind != "act":
        raise CheckpointError(f"{path}: type: got {kind!r}, expected 'act'")
    unknown = sorted(raw.keys() - KNOWN)
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]}: unknown key, expected those of LeRobot's ACT up to 0.6.1; "
            f"remove it if the policy does not need it"
        )
    if raw.get("use_peft"):
        raise CheckpointError(
            f"{path}: use_peft: got {raw['use_peft']!r}, expected false: merge the adapters into "
            "the base model (PEFT's merge_and_unload()) and save that"
        )
    if raw.get("normalization_mapping") is not None:
        check_modes(
            need(raw, "normalization_mapping", dict, path), f"{path}: normalization_mapping"
        )
    return raw


def check_modes(modes: Mapping[str, object], where: str) -> None:
    """Raise ``CheckpointError`` unless each value is a mode and each key a type of feature."""
    for group, mode in modes.items():
        if group not in FEATURE_TYPES or mode not in MODES:
            raise CheckpointError(
                f"{where}: {group}: got {mode!r}, expected one of {MODES} for one of "
                f"{FEATURE_TYPES}"
            )


def _convert_old_keys(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert the first generation's keys to today's; it had a mode for each feature."""
    converted = {key: value for key, value in raw.items() if key not in OLD_MODE_KEYS}
    for removed in REMOVED_KEYS:
        if converted.pop(removed, None):
            raise CheckpointError(
                f"{path}: {removed}: got {raw[removed]!r}, expected null or false: LeRobot has "
                "removed this option; remove it and give --action_manager temporal_ensemble"
            )
    # LeRobot wrote this key, but for some months used n_encoder_layers instead.
    converted.pop("n_vae_encoder_layers", None)
    mapping: dict[str, str] = {}
    for old, new in OLD_FEATURE_KEYS.items():
        shapes = need(raw, old, dict, path)
        modes = need(raw, old.replace("shapes", "normalization_modes"), dict, path)
        converted.pop(old)
        converted[new] = {
            name: {"type": _type(name), "shape": shape} for name, shape in shapes.items()
        }
        for name, mode in modes.items():
            if not isinstance(mode, str) or mapping.get(_type(name), mode.upper()) != mode.upper():
                raise CheckpointError(
                    f"{path}: {name}: got mode {mode!r}, expected one mode for all {_type(name)} "
                    "features"
                )
            mapping[_type(name)] = mode.upper()
    return {**converted, "normalization_mapping": mapping}


def _type(name: str) -> str:
    """Return the type of a feature of the first generation, which derived it from the name."""
    if name.startswith("observation.image"):
        return "VISUAL"
    if name == "observation.environment_state":
        return "ENV"
    return "ACTION" if name == ACTION else "STATE"


def read_features(raw: Mapping[str, Any], path: Path) -> Features:
    """Return the features of ``raw``, a result of ``read_config``.

    LeRobot's ACT uses ``observation.state`` and every image; it ignores other states and language.

    Raises:
        CheckpointError: Neither state nor image; or an environment state, depth, or images of
            several sizes.
    """
    images, state_dim = {}, 0
    for name, feature in need(raw, "input_features", dict, path).items():
        kind, shape = need(feature, "type", str, path), _shape(feature, path)
        where = f"{path}: input_features: {name}"
        if kind == "VISUAL":
            if len(shape) != 3 or shape[0] != 3:
                depth = " (depth pictures are not supported)" if shape[:1] == [1] else ""
                raise CheckpointError(f"{where}: got {shape}, expected [3, H, W]{depth}")
            images[name] = (shape[1], shape[2])
        elif kind == "STATE":
            if name == STATE:
                (state_dim,) = _vector(shape, where)
        elif kind == "ENV":
            raise CheckpointError(
                f"{where}: the state of an environment is not supported, expected {STATE!r} and "
                f"{IMAGES}*"
            )
        elif kind != "LANGUAGE":
            raise CheckpointError(
                f"{where}: got type {kind!r}, expected one of {FEATURE_TYPES} that is observed"
            )
    action = need(need(raw, "output_features", dict, path), ACTION, dict, path)
    (action_dim,) = _vector(_shape(action, path), f"{path}: {ACTION}")
    if action.get("type") != "ACTION":
        raise CheckpointError(f"{path}: {ACTION}: got type {action.get('type')!r}, expected ACTION")
    if not images or not state_dim:
        raise CheckpointError(
            f"{path}: input_features: got {sorted(raw['input_features'])}, expected at least one "
            f"camera and {STATE!r}"
        )
    sizes = set(images.values())
    if len(sizes) > 1:
        raise CheckpointError(
            f"{path}: cameras of sizes {sorted(sizes)}, expected one for all: several sizes in one "
            "policy are not supported"
        )
    return Features(tuple(images), sizes.pop(), state_dim, action_dim)


def camera_name(feature: str) -> str:
    """Return a feature's camera: "top" for ``observation.images.top``, "image" for
    ``observation.image``.
    """
    return feature.removeprefix(IMAGES).removeprefix("observation.")


def _shape(feature: Any, path: Path) -> list[int]:
    shape: list[Any] = need(feature, "shape", list, path)
    if not all(type(size) is int for size in shape):
        raise CheckpointError(f"{path}: shape: got {shape}, expected integers")
    return shape


def _vector(shape: list[int], where: str) -> list[int]:
    if len(shape) != 1:
        raise CheckpointError(f"{where}: got shape {shape}, expected one number")
    return shape
