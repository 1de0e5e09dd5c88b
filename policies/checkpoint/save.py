"""Writes an ACT checkpoint in ILStudio's or LeRobot's layout, for this package's loaders and
theirs.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from policies.act.config import ActConfig
from policies.act.model import IMAGENET_MEAN, IMAGENET_STD
from policies.act.transformer import sequence_positions
from policies.checkpoint.extras import FILE_NAMES, Extras
from policies.checkpoint.packed_weights import pack
from policies.checkpoint.weight_names import detr_keys, lerobot_keys
from policies.errors import CheckpointError

StoredAs = Literal["fp32", "bf16", "bf16_packed"]
"""Number format of the stored weights. Packed ones are smaller, but no other program reads them."""
Stats = Mapping[str, Mapping[str, Sequence[float]]]
"""``state`` and ``action`` to ``mean, std, min, max, q01, q99``, each of length D."""


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """The content of a checkpoint to write.

    Attributes:
        config: Sizes.
        tensors: By ``ActModel``'s names, with batch-norm not folded, for images normalized as
            ImageNet's.
        stats: Statistics of the data, for z-score normalizers.
        dataset_id: The data set's name.
        extras: The content of ``metronome.yaml``; its ``cameras`` are required.

    Raises:
        CheckpointError: No cameras, or a backbone for each camera.
    """

    config: ActConfig
    tensors: Mapping[str, Tensor]
    stats: Stats
    dataset_id: str
    extras: Extras

    def __post_init__(self) -> None:
        if not self.extras.cameras:
            raise CheckpointError("extras.cameras: got none, expected a contract for each camera")
        if self.config.backbone_per_camera:
            raise CheckpointError(
                "backbone_per_camera: got True, expected False: neither ILStudio's layout nor "
                "LeRobot's holds more than one backbone"
            )


def save_ilstudio(folder: Path, saved: Saved, *, stored_as: StoredAs = "fp32") -> None:
    """Write ILStudio's layout, with ``metronome.yaml``.

    Its configuration has one number for the layers of both encoders. So a style encoder of another
    depth is left out; inference does not need it.
    """
    config = saved.config
    folder.mkdir(parents=True, exist_ok=True)
    keys = detr_keys(dataclasses.replace(config, n_style_layers=config.n_encoder_layers))
    tensors = _rename(saved.tensors, keys, style=config.n_style_layers == config.n_encoder_layers)
    # ILStudio's loader expects these tensors, but nothing uses them.
    positions = sequence_positions(2 + config.chunk_size, config.width)
    tensors["model.pos_table"] = positions[None]
    tensors["model.is_pad_head.weight"] = torch.zeros(1, config.width)
    tensors["model.is_pad_head.bias"] = torch.zeros(1)
    _write_weights(folder / "model.safetensors", tensors, stored_as)
    _write_json(
        folder / "config.json",
        {
            "architectures": ["ACTPolicy"],
            "action_dim": config.action_dim,
            "state_dim": config.state_dim,
            "backbone": config.backbone,
            "camera_names": [camera.name for camera in saved.extras.cameras or ()],
            "chunk_size": config.chunk_size,
            "num_queries": config.chunk_size,
            "enc_layers": config.n_encoder_layers,
            "dec_layers": config.n_decoder_layers,
            "dim_feedforward": config.feedforward,
            "hidden_dim": config.width,
            "nheads": config.n_heads,
            "dropout": config.dropout,
            "dilation": False,
            "masks": False,
            "pre_norm": False,
            "position_embedding": "sine",
            "kl_weight": 10,
            "lr_backbone": 1e-05,
            "dtype": "float32",
        },
    )
    _write_json(
        folder / "policy_metadata.json", {"policy_module": "policy.act", "policy_name": "act"}
    )
    dataset = {"dataset_id": saved.dataset_id, "ctrl_space": "joint", "ctrl_type": "abs"}
    kinds = {saved.dataset_id: "zscore"}
    _write_json(
        folder / "normalize.json",
        {"version": "2.0", "datasets": [dataset], "state": kinds, "action": kinds},
    )
    plain = {
        what: {name: [float(x) for x in values] for name, values in table.items()}
        for what, table in saved.stats.items()
    }
    stats_path = folder / f"{saved.dataset_id}_stats_joint_abs.pkl"
    stats_path.write_bytes(pickle.dumps(plain, protocol=4))
    _write_extras(folder, saved.extras)


def save_lerobot(folder: Path, saved: Saved, *, stored_as: StoredAs = "fp32") -> None:
    """Write LeRobot's layout with processor files, without the style encoder (``use_vae`` false).

    Its images have the model's size: LeRobot's users crop them first. LeRobot reads no packed
    weights, so ``bf16_packed`` is ``bf16``.
    """
    config, execution = saved.config, saved.extras.recommended()
    n_action_steps = saved.extras.n_action_steps
    ensemble = None
    if execution is not None and execution.action_manager == "temporal_ensemble":
        n_action_steps = 1  # LeRobot requires it with an ensemble
        ensemble = 0.01 if execution.manager_coef is None else execution.manager_coef
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _rename(saved.tensors, lerobot_keys(config), style=False)
    readable: StoredAs = "bf16" if stored_as == "bf16_packed" else stored_as
    _write_weights(folder / "model.safetensors", tensors, readable)
    images = {
        f"observation.images.{camera.name}": {"type": "VISUAL", "shape": [3, *camera.model_hw]}
        for camera in saved.extras.cameras or ()
    }
    state = {"observation.state": {"type": "STATE", "shape": [config.state_dim]}}
    action = {"action": {"type": "ACTION", "shape": [config.action_dim]}}
    modes = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD")
    _write_json(
        folder / "config.json",
        {
            "type": "act",
            "n_obs_steps": 1,
            "input_features": {**images, **state},
            "output_features": action,
            "device": "cpu",
            "use_amp": False,
            "chunk_size": config.chunk_size,
            "n_action_steps": config.chunk_size if n_action_steps is None else n_action_steps,
            "normalization_mapping": modes,
            "vision_backbone": config.backbone,
            "pretrained_backbone_weights": None,
            "replace_final_stride_with_dilation": False,
            "pre_norm": False,
            "dim_model": config.width,
            "n_heads": config.n_heads,
            "dim_feedforward": config.feedforward,
            "feedforward_activation": config.activation,
            "n_encoder_layers": config.n_encoder_layers,
            "n_decoder_layers": config.n_decoder_layers,
            "use_vae": False,
            "latent_dim": config.latent_dim,
            "n_vae_encoder_layers": config.n_style_layers,
            "temporal_ensemble_coeff": ensemble,
            "dropout": config.dropout,
            "kl_weight": 10.0,
        },
    )
    stats = _lerobot_stats(saved, list(images))
    for name, step, features in (
        ("preprocessor", "normalizer", {**images, **state, **action}),
        ("postprocessor", "unnormalizer", action),
    ):
        steps: list[dict[str, Any]] = [
            {
                "registry_name": f"{step}_processor",
                "config": {"eps": 1e-8, "features": features, "norm_map": modes},
                "state_file": f"policy_{name}_step_0_{step}_processor.safetensors",
            }
        ]
        device = {
            "registry_name": "device_processor",
            "config": {"device": "cpu", "float_dtype": None},
        }
        if name == "preprocessor":
            rename = {
                "registry_name": "rename_observations_processor",
                "config": {"rename_map": {}},
            }
            steps = [rename, {"registry_name": "to_batch_processor", "config": {}}, device, *steps]
            steps[-1]["state_file"] = f"policy_{name}_step_3_{step}_processor.safetensors"
        else:
            steps.append(device)
        state_file = next(s["state_file"] for s in steps if "state_file" in s)
        save_file(stats, folder / state_file)
        _write_json(folder / f"policy_{name}.json", {"name": f"policy_{name}", "steps": steps})
    _write_extras(folder, saved.extras)


def _lerobot_stats(saved: Saved, images: Sequence[str]) -> dict[str, Tensor]:
    from policies.normalizer import MIN_SIGMA

    stats: dict[str, Tensor] = {}
    for feature, what in (("observation.state", "state"), ("action", "action")):
        for name, values in saved.stats[what].items():
            tensor = torch.tensor(list(values), dtype=torch.float32)
            # LeRobot has no lower limit for deviations.
            stats[f"{feature}.{name}"] = tensor.clamp(min=MIN_SIGMA) if name == "std" else tensor
    for feature in images:
        stats[f"{feature}.mean"] = torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1)
        stats[f"{feature}.std"] = torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    return stats


def _rename(
    tensors: Mapping[str, Tensor], keys: Mapping[str, str], *, style: bool
) -> dict[str, Tensor]:
    return {
        foreign: tensors[internal]
        for foreign, internal in keys.items()
        if (style and internal in tensors) or not internal.startswith("style.")
    }


def _write_weights(path: Path, tensors: Mapping[str, Tensor], stored_as: StoredAs) -> None:
    """Write the weights; vectors (norms, biases) always in float32.

    Vectors are small, and variances need the precision.
    """
    stored = {}
    for key, tensor in tensors.items():
        narrow = stored_as != "fp32" and tensor.ndim > 1
        dtype = torch.bfloat16 if narrow else torch.float32
        stored[key] = tensor.detach().to(device="cpu", dtype=dtype).contiguous().clone()
    if stored_as == "bf16_packed":
        stored = pack(stored)
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_extras(folder: Path, extras: Extras) -> None:
    """Write the keys that differ from their defaults, as YAML."""
    plain = {
        field.name: _plain(getattr(extras, field.name))
        for field in dataclasses.fields(extras)
        if getattr(extras, field.name) != getattr(Extras(), field.name)
    }
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
    (folder / FILE_NAMES[0]).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Convert dataclasses and tuples to YAML's types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
