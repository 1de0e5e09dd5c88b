"""Loads a checkpoint of any supported layout as a ``Policy``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from policies.checkpoint.python_factory import PREFIX, load_factory
from policies.checkpoint.weight_folders import ADAPTERS, LEROBOT_PREFIX, find_folder, user_path
from policies.errors import CheckpointError
from policies.types import Policy

if TYPE_CHECKING:
    from policies.act.weights import ActWeights
    from policies.checkpoint.extras import Extras


def load_policy(
    path: str,
    *,
    device: str = "auto",
    engine: str = "auto",
    precision: str = "auto",
    dataset_id: str | None = None,
    chunk_size: int | None = None,
    camera_names: Sequence[str] | None = None,
    n_heads: int | None = None,
    image_hw: tuple[int, int] | None = None,
    threads: int | None = None,
    fps: float | None = None,
    graph_options: Sequence[str] | None = None,
) -> Policy:
    """Load the policy at ``path``.

    A factory takes none of the options: its policy defines everything.

    Args:
        path: A checkpoint folder of ILStudio (its newest ``checkpoint-N``, where the folder itself
            has no weights), of LeRobot (or with ``pretrained_model`` in it), or of the original
            ACT; or ``lerobot:PATH``, a LeRobot checkpoint for the installed ``lerobot`` package; or
            ``python:package.module:factory``.
        device: "auto", "cpu", "cuda" or "cuda:N".
        engine: "auto", "torch", "openvino" or "cuda-graph".
        precision: "auto", "fp32", "bf16" or "fp16".
        dataset_id: Data set of the normalizers, where the checkpoint has several.
        chunk_size: Cut chunks to this many actions.
        camera_names, n_heads: What the original's layout does not say.
        image_hw: (height, width) of the images, where the checkpoint does not say it or another
            size is wanted; refused if ``cameras`` of ``metronome.yaml`` contradict it.
        threads: CPU threads of one inference; all cores but one where None.
        fps: Policy ticks per second, where the checkpoint does not say it or another rate is
            wanted.
        graph_options: Steps of the engine of CUDA graphs, see ``policies.act.engine``.

    Raises:
        CheckpointError: The checkpoint cannot be loaded; names file, key, got and expected.
        ContractMismatch: This machine or the checkpoint does not have what was requested.
    """
    if path.startswith(PREFIX):
        _refuse_options(
            path,
            "a factory's policy defines it",
            device=(device, "auto"),
            engine=(engine, "auto"),
            precision=(precision, "auto"),
            dataset_id=(dataset_id, None),
            chunk_size=(chunk_size, None),
            camera_names=(camera_names, None),
            n_heads=(n_heads, None),
            image_hw=(image_hw, None),
            threads=(threads, None),
            fps=(fps, None),
            graph_options=(graph_options, None),
        )
        return load_factory(path)
    if path.startswith(LEROBOT_PREFIX):
        from policies.checkpoint.lerobot_package import load_lerobot_package

        _refuse_options(
            path,
            "LeRobot's configuration defines it",
            dataset_id=(dataset_id, None),
            camera_names=(camera_names, None),
            n_heads=(n_heads, None),
            image_hw=(image_hw, None),
            graph_options=(graph_options, None),
        )
        return load_lerobot_package(
            path,
            device=device,
            engine=engine,
            precision=precision,
            chunk_size=chunk_size,
            threads=threads,
            fps=fps,
        )
    # torch is slow to import, and a user's own policy may not need it.
    from policies.act.policy import ActPolicy

    weights = load_weights(
        path,
        dataset_id=dataset_id,
        camera_names=camera_names,
        n_heads=n_heads,
        image_hw=image_hw,
    )
    if fps is not None:
        weights = dataclasses.replace(weights, dt_s=1 / fps)
    return ActPolicy(
        weights,
        checkpoint=path,
        device=device,
        engine=engine,
        precision=precision,
        chunk_size=chunk_size,
        threads=threads,
        graph_options=graph_options,
    )


def load_weights(
    path: str,
    *,
    dataset_id: str | None = None,
    camera_names: Sequence[str] | None = None,
    n_heads: int | None = None,
    image_hw: tuple[int, int] | None = None,
) -> ActWeights:
    """Load the checkpoint folder at ``path`` without building an engine; arguments as
    ``load_policy``.
    """
    from policies.checkpoint.extras import read_extras
    from policies.checkpoint.file_readers import read_json, read_weights
    from policies.checkpoint.ilstudio import load_ilstudio
    from policies.checkpoint.lerobot import load_lerobot
    from policies.checkpoint.lerobot_config import is_lerobot
    from policies.checkpoint.original import find_weights, load_original

    given = user_path(path)
    folder = find_folder(given)
    extras = read_extras(folder, given)
    config_path = folder / "config.json"
    if config_path.is_file():
        config = read_json(config_path)
        if is_lerobot(config):
            _refuse_dataset_id("LeRobot", path, dataset_id)
            _refuse_redundant(path, camera_names, n_heads, extras)
            return load_lerobot(folder, extras, image_hw=image_hw)
        _refuse_redundant(path, camera_names, n_heads, extras)
        return load_ilstudio(folder, extras, dataset_id=dataset_id, image_hw=image_hw)
    if find_weights(folder) is not None:
        _refuse_dataset_id("the original ACT", path, dataset_id)
        names = None if camera_names is None else tuple(camera_names)
        return load_original(folder, extras, camera_names=names, n_heads=n_heads, image_hw=image_hw)
    if any((folder / name).is_file() for name in ADAPTERS):
        read_weights(folder)  # raises an error about adapters
    raise CheckpointError(
        f"{folder}: unknown layout of a checkpoint: expected config.json with model.safetensors "
        f"(ILStudio, LeRobot), or policy_best.ckpt with dataset_stats.pkl (the original ACT); "
        f"got {sorted(p.name for p in folder.iterdir())[:12]}"
    )


def _refuse_options(path: str, why: str, **options: tuple[Any, Any]) -> None:
    """Raise ``CheckpointError`` for an option (value, default) that is not at its default."""
    for name, (value, default) in options.items():
        if value != default:
            raise CheckpointError(f"{path}: {name}: got {value!r}, expected none: {why}")


def _refuse_dataset_id(layout: str, path: str, dataset_id: str | None) -> None:
    """Raise ``CheckpointError`` for a ``dataset_id``, which ``layout`` does not have."""
    if dataset_id is not None:
        raise CheckpointError(
            f"{path}: dataset_id: got {dataset_id!r}, expected none: {layout}'s layout has one "
            "unnamed set of normalizers"
        )


def _refuse_redundant(
    path: str, camera_names: Sequence[str] | None, n_heads: int | None, extras: Extras
) -> None:
    """Raise ``CheckpointError`` for an option that the checkpoint's own layout defines."""
    for name, value, source in (
        ("camera_names", camera_names, path),
        ("n_heads", n_heads, path),
        ("camera_names", extras.camera_names, f"{path}: metronome.yaml"),
        ("n_heads", extras.n_heads, f"{path}: metronome.yaml"),
        ("action_statistics", extras.action_statistics, f"{path}: metronome.yaml"),
    ):
        if value is not None:
            raise CheckpointError(
                f"{source}: {name}: got {value}, expected none: this layout defines it"
            )
