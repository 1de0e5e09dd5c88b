"""LeRobot's two layouts: normalization in processor files; and, older, in the weights' buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from policies.act.config import ActConfig
from policies.act.weights import ActWeights, Triples
from policies.checkpoint.assemble import assemble
from policies.checkpoint.extras import Extras
from policies.checkpoint.files import need, read_json, read_safetensors
from policies.checkpoint.keys import LEROBOT_DEAD_KEYS, lerobot_keys, translate
from policies.errors import CheckpointError
from policies.execution import Execution
from policies.normalize import Normalizer, identity

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
IMAGES = "observation.images."
STATE = "observation.state"
ACTION = "action"
EPS = 1e-8
BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
HARMLESS_STEPS = frozenset(
    {
        "rename_observations_processor",
        "to_batch_processor",
        "device_processor",
        "normalizer_processor",
        "unnormalizer_processor",
    }
)


@dataclass(frozen=True, slots=True)
class _Norms:
    """How to find a feature's statistics: ``stat(feature, name)`` raises where it is missing."""

    modes: Mapping[str, str]
    stat: Callable[[str, str], Tensor]
    source: Path
    divide_by_std_plus_eps: float = EPS


def load_lerobot(
    folder: Path, extras: Extras, *, image_hw: tuple[int, int] | None = None
) -> ActWeights:
    """The checkpoint in ``folder``.

    Raises:
        CheckpointError: Anything missing, unknown, of another kind, or not as expected.
    """
    path = folder / CONFIG
    raw = read_json(path)
    kind = raw.get("type", "act")
    if kind != "act":
        raise CheckpointError(f"{path}: type: got {kind!r}, expected 'act'")
    features = _features(raw, path)
    names = tuple(name.removeprefix(IMAGES) for name in features.cameras)
    size = image_hw or (None if extras.cameras or extras.image_hw else features.image_hw)
    cameras = extras.camera_contracts(names, size, path)
    config = _config(raw, path, features, len(cameras), cameras[0].model_hw)
    tensors = read_safetensors(folder / WEIGHTS)
    inputs, outputs = _norms(folder, raw, tensors, path)
    weights = {k: v for k, v in tensors.items() if not k.startswith(BUFFERS)}
    steps, execution = _execution(raw, config, path)
    return assemble(
        config,
        translate(weights, lerobot_keys(config), LEROBOT_DEAD_KEYS, config, folder / WEIGHTS),
        extras,
        state=_normalizer(inputs, STATE, "STATE", config.state_dim),
        action=_normalizer(outputs, ACTION, "ACTION", config.action_dim, output=True),
        cameras=cameras,
        image_norm=_image_norm(inputs, features.cameras),
        n_action_steps=steps,
        execution=execution,
    )


def _execution(raw: Mapping[str, Any], config: ActConfig, path: Path) -> tuple[int, Execution]:
    """``n_action_steps`` of a strategy that plays chunks one after another, and what is to play.

    With an ensemble LeRobot demands ``n_action_steps`` 1, which means its re-planning then: for
    another strategy of the user's, nothing is said but the chunk.
    """
    key, coefficient = "temporal_ensemble_coeff", raw.get("temporal_ensemble_coeff")
    steps = need(raw, "n_action_steps", int, path)
    if not 1 <= steps <= config.chunk_size:
        raise CheckpointError(
            f"{path}: n_action_steps: got {steps}, expected 1 to chunk_size = {config.chunk_size}"
        )
    if coefficient is None:
        said = Execution("sequential", None, steps, f"{CONFIG}: n_action_steps")
        return steps, said
    if steps != 1:
        raise CheckpointError(f"{path}: n_action_steps: got {steps}, expected 1 with {key}")
    coefficient = float(need(raw, key, (int, float), path))
    try:
        return config.chunk_size, Execution("temporal_ensemble", coefficient, 1, f"{CONFIG}: {key}")
    except ValueError as error:
        raise CheckpointError(f"{path}: {key}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Features:
    cameras: tuple[str, ...]
    image_hw: tuple[int, int]
    state_dim: int
    action_dim: int


def _features(raw: Mapping[str, Any], path: Path) -> _Features:
    cameras, state_dim = {}, 0
    for name, feature in need(raw, "input_features", dict, path).items():
        kind, shape = need(feature, "type", str, path), _shape(feature, path)
        if kind == "VISUAL" and len(shape) == 3 and shape[0] == 3:
            cameras[name] = (shape[1], shape[2])
        elif kind == "STATE" and name == STATE and len(shape) == 1:
            state_dim = shape[0]
        else:
            raise CheckpointError(
                f"{path}: input_features: got {name!r} ({kind} {shape}), expected {STATE!r} and "
                f"{IMAGES}* (VISUAL [3, H, W])"
            )
    outputs = need(raw, "output_features", dict, path)
    action = _shape(need(outputs, ACTION, dict, path), path)
    if not cameras or not state_dim or len(action) != 1:
        raise CheckpointError(f"{path}: expected at least one camera, {STATE!r} and {ACTION!r}")
    sizes = set(cameras.values())
    if len(sizes) > 1:
        raise CheckpointError(f"{path}: cameras of sizes {sorted(sizes)}, expected one for all")
    return _Features(tuple(cameras), sizes.pop(), state_dim, action[0])


def _shape(feature: Any, path: Path) -> list[int]:
    shape: list[Any] = need(feature, "shape", list, path)
    if not all(type(size) is int for size in shape):
        raise CheckpointError(f"{path}: shape: got {shape}, expected integers")
    return shape


def _config(
    raw: Mapping[str, Any], path: Path, features: _Features, n_cameras: int, hw: tuple[int, int]
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
            n_style_layers=need(
                {"n_vae_encoder_layers": 4, **raw}, "n_vae_encoder_layers", int, path
            ),
            latent_dim=need(raw, "latent_dim", int, path),
            backbone=need(raw, "vision_backbone", str, path),
            activation=raw.get("feedforward_activation", "relu"),
        )
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(path) in text else f"{path}: {text}") from error


def _norms(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[_Norms, _Norms]:
    """Where inputs' and outputs' statistics are."""
    if (folder / PREPROCESSOR).is_file():
        return (
            _from_processor(folder / PREPROCESSOR, "normalizer_processor"),
            _from_processor(folder / POSTPROCESSOR, "unnormalizer_processor"),
        )
    if not any(key.startswith(BUFFERS) for key in tensors):
        raise CheckpointError(
            f"{folder}: no normalizer: neither {PREPROCESSOR} nor normalize_inputs.* in {WEIGHTS}"
        )
    modes = need(raw, "normalization_mapping", dict, path)

    def buffer(prefix: str) -> Callable[[str, str], Tensor]:
        def stat(feature: str, name: str) -> Tensor:
            key = f"{prefix}.buffer_{feature.replace('.', '_')}.{name}"
            if key not in tensors:
                raise CheckpointError(f"{folder / WEIGHTS}: key {key!r} is missing")
            return tensors[key]

        return stat

    weights = folder / WEIGHTS
    return (
        _Norms(modes, buffer("normalize_inputs"), weights),
        _Norms(modes, buffer("unnormalize_outputs"), weights),
    )


def _from_processor(path: Path, wanted: str) -> _Norms:
    found: _Norms | None = None
    for step in need(read_json(path), "steps", list, path):
        name = need(step, "registry_name", str, path)
        config = need({"config": {}, **step}, "config", dict, path)
        if name not in HARMLESS_STEPS:
            raise CheckpointError(
                f"{path}: step {name!r} is not supported, expected {sorted(HARMLESS_STEPS)}"
            )
        if config.get("rename_map"):
            raise CheckpointError(
                f"{path}: rename_map: got {config['rename_map']}, expected none (cameras are "
                "renamed by camera_map)"
            )
        if name == wanted:
            state_path = path.parent / Path(need(step, "state_file", str, path)).name
            found = _processor_norms(state_path, config, path)
    if found is None:
        raise CheckpointError(f"{path}: step {wanted!r} is missing: there is no normalizer")
    return found


def _processor_norms(state_path: Path, config: Mapping[str, Any], path: Path) -> _Norms:
    stats = read_safetensors(state_path)

    def stat(feature: str, name: str) -> Tensor:
        key = f"{feature}.{name}"
        if key not in stats:
            raise CheckpointError(f"{state_path}: key {key!r} is missing")
        return stats[key]

    eps = need({"eps": EPS, **config}, "eps", (int, float), path)
    return _Norms(need(config, "norm_map", dict, path), stat, state_path, float(eps))


def _normalizer(
    norms: _Norms, feature: str, group: str, dim: int, *, output: bool = False
) -> Normalizer:
    """LeRobot adds eps to the deviation when it normalizes, and not when it goes back."""
    mode = norms.modes.get(group, "IDENTITY")
    pairs = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
    if mode == "IDENTITY":
        return identity(dim)
    if not isinstance(mode, str) or mode not in pairs:
        raise CheckpointError(
            f"{norms.source}: {group}: got {mode!r}, expected one of {(*pairs, 'IDENTITY')}"
        )
    first, second = (norms.stat(feature, name).double().flatten().numpy() for name in pairs[mode])
    if first.shape != (dim,) or second.shape != (dim,):
        raise CheckpointError(
            f"{norms.source}: {feature}: got {first.shape} statistics, expected ({dim},)"
        )
    eps = norms.divide_by_std_plus_eps
    if mode == "MEAN_STD":
        shift, scale = first, second if output else second + eps
    else:
        span = np.where(second == first, eps, second - first)
        shift, scale = first + span / 2, span / 2
    unbounded = np.full(dim, np.inf)
    try:
        return Normalizer(mode.lower(), shift, scale, -unbounded, unbounded)
    except CheckpointError as error:
        raise CheckpointError(f"{norms.source}: {feature}: {error}") from error


def _image_norm(norms: _Norms, cameras: tuple[str, ...]) -> tuple[Triples, Triples]:
    """(mean, std) of each camera's picture in [0, 1], one triple each."""
    mode = norms.modes.get("VISUAL", "IDENTITY")
    if mode == "IDENTITY":
        return ((0.0, 0.0, 0.0),) * len(cameras), ((1.0, 1.0, 1.0),) * len(cameras)
    if mode != "MEAN_STD":
        raise CheckpointError(
            f"{norms.source}: VISUAL: got {mode!r}, expected 'MEAN_STD' or 'IDENTITY'"
        )
    means, stds = [], []
    for camera in cameras:
        mean, std = (norms.stat(camera, name).double().flatten() for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not (std > 0).all():
            raise CheckpointError(
                f"{norms.source}: {camera}: got {len(mean)} means and deviations {std.tolist()}, "
                "expected 3 of each, positive"
            )
        means.append((float(mean[0]), float(mean[1]), float(mean[2])))
        scale = std + norms.divide_by_std_plus_eps
        stds.append((float(scale[0]), float(scale[1]), float(scale[2])))
    return tuple(means), tuple(stds)
