"""Loads ILStudio's layout: ``config.json``, ``model.safetensors``, ``policy_metadata.json``,
``normalize.json`` and ``<dataset_id>_stats_<space>_<type>.pkl`` for each data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from policies.act.config import LARGEST_LAYERS, ActConfig
from policies.act.weights import ActWeights
from policies.checkpoint.extras import Extras
from policies.checkpoint.file_readers import need, read_json, read_weights, refuse_unknown
from policies.checkpoint.hub_snapshot import refuse_hub_pickle
from policies.checkpoint.policy_assembly import assemble
from policies.checkpoint.safe_pickle import read_pickle
from policies.checkpoint.weight_folders import WEIGHTS
from policies.checkpoint.weight_names import detr_keys, detr_unused_keys, translate
from policies.errors import CheckpointError
from policies.execution import Assumption
from policies.normalizer import Normalizer, from_stats, identity
from policies.types import CtrlSpace, CtrlType

CONFIG = "config.json"
METADATA = "policy_metadata.json"
NORMALIZE = "normalize.json"
VERSION = "2.0"
"""Supported version of ``normalize.json``."""
DATASET_KEYS = frozenset(
    {"dataset_id", "ctrl_space", "ctrl_type", "action_norm_mask", "state_norm_mask"}
)
CTRL_SPACES = ("joint", "ee")
CTRL_TYPES = {"abs": "abs", "delta": "delta", "rel": "relative", "relative": "relative"}
"""ILStudio's names of the control types to ours."""


@dataclass(frozen=True, slots=True)
class _Dataset:
    dataset_id: str
    ctrl_space: CtrlSpace
    ctrl_type: CtrlType
    state: Normalizer
    action: Normalizer
    known: tuple[str, ...]


def load_ilstudio(
    folder: Path,
    extras: Extras,
    *,
    dataset_id: str | None = None,
    image_hw: tuple[int, int] | None = None,
) -> ActWeights:
    """Load the checkpoint in ``folder`` with the normalizers of ``dataset_id`` (default: the
    first).

    ``normalize.json`` and the metadata may lie in the parent of a ``checkpoint-N`` folder.

    Raises:
        CheckpointError: A file or key is missing, unknown, or not as expected.
    """
    _check_policy_name(folder)
    path = folder / CONFIG
    raw = read_json(path)
    names = tuple(need(raw, "camera_names", list, path))
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: camera_names: got {names}, expected names")
    cameras = extras.camera_contracts(names, image_hw, path)
    config = _config(raw, path, len(cameras), cameras[0].model_hw)
    tensors = translate(
        read_weights(folder),
        detr_keys(config),
        detr_unused_keys(_decoder_layers(raw, path)),
        config,
        folder / WEIGHTS,
    )
    dataset = _dataset(folder, dataset_id, {"state": config.state_dim, "action": config.action_dim})
    for name, normalizer, dim in (
        ("state", dataset.state, config.state_dim),
        ("action", dataset.action, config.action_dim),
    ):
        if normalizer.dim != dim:
            raise CheckpointError(
                f"{folder}: {name} statistics of {dataset.dataset_id!r}: got {normalizer.dim} "
                f"dimensions, expected {dim} ({CONFIG})"
            )
    assumed = extras.assumed_sizes(image_hw)
    if dataset_id is None and len(dataset.known) > 1:
        which = f"of {dataset.dataset_id!r}, the first of {list(dataset.known)}"
        assumed += (Assumption("normalizer", which, "--dataset_id"),)
    weights = assemble(
        config,
        tensors,
        extras,
        state=dataset.state,
        action=dataset.action,
        cameras=cameras,
        assumed=assumed,
    )
    return dataclasses.replace(
        weights,
        ctrl_space=dataset.ctrl_space,
        ctrl_type=dataset.ctrl_type,
        dataset_id=dataset.dataset_id,
        dataset_ids=dataset.known,
    )


def _check_policy_name(folder: Path) -> None:
    path = _beside(folder, METADATA)
    if path.is_file():
        kind = need(read_json(path), "policy_name", str, path)
        if kind != "act":
            raise CheckpointError(f"{path}: policy_name: got {kind!r}, expected 'act'")


def _config(
    raw: Mapping[str, Any], path: Path, n_cameras: int, image_hw: tuple[int, int]
) -> ActConfig:
    refused = {
        "pre_norm": (False,),
        "dilation": (False,),
        "masks": (False,),
        "position_embedding": ("sine", "v2"),
    }
    for key, accepted in refused.items():
        if raw.get(key, accepted[0]) not in accepted:
            raise CheckpointError(f"{path}: {key}: got {raw[key]!r}, expected {accepted[0]!r}")
    layers = need(raw, "enc_layers", int, path)
    try:
        return ActConfig(
            state_dim=need(raw, "state_dim", int, path),
            action_dim=need(raw, "action_dim", int, path),
            chunk_size=need(raw, "chunk_size", int, path),
            n_cameras=n_cameras,
            image_hw=image_hw,
            width=need(raw, "hidden_dim", int, path),
            n_heads=need(raw, "nheads", int, path),
            feedforward=need(raw, "dim_feedforward", int, path),
            n_encoder_layers=layers,
            n_style_layers=layers,
            backbone=need(raw, "backbone", str, path),
        )
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(path) in text else f"{path}: {text}") from error


def _decoder_layers(raw: Mapping[str, Any], path: Path) -> int:
    layers: int = need(raw, "dec_layers", int, path)
    if not 1 <= layers <= LARGEST_LAYERS:
        raise CheckpointError(f"{path}: dec_layers: got {layers}, expected 1 to {LARGEST_LAYERS}")
    return layers


def _dataset(folder: Path, dataset_id: str | None, dims: Mapping[str, int]) -> _Dataset:
    path = _beside(folder, NORMALIZE)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; without it there is no normalizer")
    raw = read_json(path)
    refuse_unknown(raw, {"version", "datasets", "state", "action"}, path)
    if raw.get("version", VERSION) != VERSION:
        raise CheckpointError(f"{path}: version: got {raw['version']!r}, expected {VERSION!r}")
    entries: dict[str, Mapping[str, Any]] = {}
    for entry in need(raw, "datasets", list, path):
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path}: datasets: got {entry!r}, expected objects")
        refuse_unknown(entry, DATASET_KEYS, path, at="datasets: ")
        entries[need(entry, "dataset_id", str, path)] = entry
    known = tuple(entries)
    chosen = dataset_id if dataset_id is not None else next(iter(known), None)
    if chosen not in entries:
        raise CheckpointError(f"{path}: dataset_id: got {chosen!r}, expected one of {list(known)}")
    if chosen != Path(chosen).name:
        raise CheckpointError(f"{path}: dataset_id: got {chosen!r}, expected a plain name")
    entry = entries[chosen]
    space = need(entry, "ctrl_space", str, path)
    control = need(entry, "ctrl_type", str, path)
    if space not in CTRL_SPACES or control not in CTRL_TYPES:
        raise CheckpointError(
            f"{path}: {chosen}: got ctrl_space {space!r}, ctrl_type {control!r}, expected one of "
            f"{CTRL_SPACES} and one of {tuple(CTRL_TYPES)}"
        )
    kinds = {what: need(need(raw, what, dict, path), chosen, str, path) for what in dims}
    normalizers = {}
    for what, kind in kinds.items():
        if kind == "identity":
            normalizers[what] = identity(dims[what])
            continue
        stats_path = _stats_path(path.parent, chosen, space, control)
        table = need(read_pickle(stats_path), what, dict, stats_path)
        mask = entry.get(f"{what}_norm_mask")
        if mask is not None and not isinstance(mask, list):
            raise CheckpointError(f"{path}: {what}_norm_mask: got {mask!r}, expected a list")
        normalizers[what] = from_stats(
            kind, table, mask=mask, source=f"{stats_path}: {what}", output=what == "action"
        )
    return _Dataset(
        chosen,
        cast("CtrlSpace", space),
        cast("CtrlType", CTRL_TYPES[control]),
        normalizers["state"],
        normalizers["action"],
        known,
    )


def _stats_path(folder: Path, dataset_id: str, space: str, control: str) -> Path:
    own = folder / f"{dataset_id}_stats_{space}_{control}.pkl"
    shared = folder / f"dataset_stats_{space}_{control}.pkl"
    for path in (own, shared):
        if path.is_file():
            return path
    refuse_hub_pickle(own)
    raise CheckpointError(f"{own}: missing, the normalizer of data set {dataset_id!r}")


def _beside(folder: Path, name: str) -> Path:
    """Return ``name`` in ``folder``, or in its parent where ``folder`` is a ``checkpoint-N``."""
    if not (folder / name).is_file() and folder.resolve().name.startswith("checkpoint-"):
        parent = folder.resolve().parent / name
        if parent.is_file():
            return parent
    return folder / name
