"""Differences of the original ACT's descendants: Mobile ALOHA's act-plus-plus, Agilex's
cobot_magic.

Both have a backbone for each camera. Networks that ``ActModel`` cannot represent are recognized
here from the weights' names and shapes, and refused by the name of their option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from policies.act.config import Backbone
from policies.checkpoint.file_readers import need
from policies.checkpoint.safe_pickle import read_pickle
from policies.checkpoint.weight_names import LINEAR, style_names, transformer_names
from policies.errors import CheckpointError
from policies.execution import Execution

BACKBONES = "model.backbones."
LATENT_POSITION, STATE_POSITION = "model.latent_pos.weight", "model.robot_state_pos.weight"
BOTH_POSITIONS = "model.additional_pos_embed.weight"
STYLE_LAYERS = "model.encoder.layers."
SETTINGS = "config.pkl"
TEMPORAL_AGG_COEF = 0.01
"""act-plus-plus's ``k``: weights are exp(-k·i), the oldest first, with a new chunk every tick."""

BOTTLENECK = f"{BACKBONES}0.0.body.layer1.0.conv3."
"""A weight that only bottleneck blocks have."""
DEEP_STAGE = {6: "resnet50", 23: "resnet101", 36: "resnet152"}
"""Bottleneck blocks in the third stage to the network's name."""

REFUSED = {
    "model.depth_backbones.": "use_depth_image: got True, expected False",
    "model.backbone_down_projs.": "policy_class: got 'CNNMLP', expected 'ACT'",
    "model.input_proj_env_state.": "env_state: got a policy without cameras, expected one with",
    "model.transformer.encoder.norm.": "pre_norm: got True, expected False",
    f"{BACKBONES}0.1.": "position_embedding: got 'learned', expected 'sine'",
}
"""Prefixes of weights' names, and the option that each one shows."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that act-plus-plus writes beside its checkpoints.

    Attributes:
        path: The file.
        camera_names: In the order of the network's inputs.
        n_heads: Heads of the transformer's attention.
        execution: How its own evaluation executes chunks; None for whole chunks one after another.
    """

    path: Path
    camera_names: tuple[str, ...]
    n_heads: int
    execution: Execution | None = None

    def check(self, camera_names: tuple[str, ...], n_heads: int) -> None:
        """Check other sources' values against the file. Cameras may be renamed, not reordered.

        Raises:
            CheckpointError: A value contradicts the file.
        """
        if n_heads != self.n_heads:
            raise CheckpointError(f"{self.path}: n_heads: got {n_heads}, expected {self.n_heads}")
        moved = [
            name
            for index, name in enumerate(camera_names)
            if name in self.camera_names and self.camera_names.index(name) != index
        ]
        if moved or len(camera_names) != len(self.camera_names):
            raise CheckpointError(
                f"{self.path}: camera_names: got {camera_names}, expected {self.camera_names} "
                "in this order, or other names for them"
            )


def read_settings(folder: Path) -> Settings | None:
    """Return act-plus-plus's ``config.pkl``, or None where there is none.

    Raises:
        CheckpointError: The file cannot be read, or describes a policy that is not supported.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    raw = read_pickle(path)
    kind = need(raw, "policy_class", str, path)
    if kind != "ACT":
        raise CheckpointError(f"{path}: policy_class: got {kind!r}, expected 'ACT'")
    network = need(raw, "policy_config", dict, path)
    if network.get("vq", False):
        raise CheckpointError(_no_vq(path))
    names = need(network, "camera_names", list, path)
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: camera_names: got {names}, expected names")
    temporal_agg = raw.get("temporal_agg", False)
    if not isinstance(temporal_agg, bool):
        raise CheckpointError(f"{path}: temporal_agg: got {temporal_agg!r}, expected a bool")
    execution = (
        Execution("temporal_ensemble", TEMPORAL_AGG_COEF, 1, f"{SETTINGS}: temporal_agg")
        if temporal_agg
        else None
    )
    return Settings(path, tuple(names), need(network, "nheads", int, path), execution)


def is_agilex(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether cobot_magic's code wrote these weights."""
    return LATENT_POSITION in tensors or STATE_POSITION in tensors


def check_supported(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse networks of the descendants that ``ActModel`` cannot represent.

    Raises:
        CheckpointError: Names the option, and the key that shows it.
    """
    for key in sorted(tensors):
        for prefix, option in REFUSED.items():
            if key.startswith(prefix):
                raise CheckpointError(f"{path}: {option} (key {key!r})")
        if key.startswith(BOTTLENECK):
            third = f"{BACKBONES}0.0.body.layer3."
            blocks = {k.removeprefix(third).split(".")[0] for k in tensors if k.startswith(third)}
            name = DEEP_STAGE.get(len(blocks), "a ResNet of bottleneck blocks")
            raise CheckpointError(
                f"{path}: backbone: got {name!r}, expected one of {get_args(Backbone)}"
            )
    into, out = (tensors.get(f"model.{name}.weight") for name in ("latent_out_proj", "latent_proj"))
    if into is None or out is None or into.ndim != 2:
        return
    latent = into.shape[1]
    if out.ndim == 2 and len(out) == latent:
        raise CheckpointError(_no_vq(path))
    if out.ndim != 2 or len(out) != 2 * latent:
        raise CheckpointError(
            f"{path}: model.latent_proj.weight: got shape {tuple(out.shape)}, expected "
            f"{2 * latent} rows, a mean and a log-variance of the latent"
        )


def _no_vq(path: Path) -> str:
    return (
        f"{path}: use_vq: got True, expected False: a second network draws the latent of such a "
        "policy at random"
    )


def with_original_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return ``tensors`` with cobot_magic's two position tables joined as the original's one.

    Raises:
        CheckpointError: One of the two is missing or of another shape.
    """
    if not is_agilex(tensors):
        return dict(tensors)
    rows = []
    for key in (LATENT_POSITION, STATE_POSITION):
        if key not in tensors:
            raise CheckpointError(f"{path}: key {key!r} is missing")
        if tensors[key].ndim != 2 or len(tensors[key]) != 1:
            raise CheckpointError(
                f"{path}: {key}: got shape {tuple(tensors[key].shape)}, expected one row"
            )
        rows.append(tensors[key])
    if rows[0].shape != rows[1].shape:
        raise CheckpointError(
            f"{path}: {STATE_POSITION}: got shape {tuple(rows[1].shape)}, expected "
            f"{tuple(rows[0].shape)}"
        )
    renamed = {k: v for k, v in tensors.items() if k not in (LATENT_POSITION, STATE_POSITION)}
    return {**renamed, BOTH_POSITIONS: torch.cat(rows)}


def unused_names(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names that affect no action, beyond the original's.

    * cobot_magic's own inference skips ``input_proj_next_action``, which older versions wrote.
    * act-plus-plus builds its style encoder as a whole transformer, which users repair to train.
    * Without a style encoder (``no_encoder``, or a ``kl_weight`` of 0) the modules around it stay.
    """
    unused = {f"model.input_proj_next_action.{part}" for part in LINEAR}
    if any(key.startswith(STYLE_LAYERS) for key in tensors):
        return unused
    return unused | set(style_names()) | set(transformer_names("model.encoder", tensors))
