"""Finds the folder that holds a checkpoint's weights, without importing torch, which is slow."""

from __future__ import annotations

import re
from pathlib import Path

from policies.errors import CheckpointError

LEROBOT_PREFIX = "lerobot:"
"""Before the path of a checkpoint that the installed ``lerobot`` package shall run."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Lists the files of weights that are split over several."""
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
"""Files of PEFT adapters."""


def user_path(text: str) -> Path:
    """Return ``text`` as a path with ``~`` and ``~user`` expanded, as no shell does in
    ``--flag=~/x``.

    Raises:
        CheckpointError: There is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{text}: {error}") from error


def find_folder(path: Path) -> Path:
    """Return the folder that holds the weights: ``path``, or a folder below it.

    Trainers and the Hugging Face hub's cache put checkpoints into folders below the one that users
    name.

    Raises:
        CheckpointError: No such folder, or a cache of several snapshots.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: got a file, expected a checkpoint's folder, e.g. {path.absolute().parent}"
        )
    child: Path | None = path
    while child is not None:
        path, child = child, _next_folder(child)
    return path


def _next_folder(folder: Path) -> Path | None:
    """Return the subfolder to search next; None if the weights should be in ``folder`` itself."""
    if (folder / "config.json").is_file() and _has_weights(folder):
        return None
    if (folder / "snapshots").is_dir():
        return _hub_snapshot(folder)
    if (folder / "pretrained_model").is_dir():
        return folder / "pretrained_model"
    # LeRobot writes checkpoints/NUMBER/pretrained_model, and a link "last".
    for steps in (folder / "checkpoints", folder):
        numbered = _numbered(steps, r"(\d+)", "pretrained_model")
        if (steps / "last" / "pretrained_model").is_dir():
            return steps / "last"
        if numbered:
            return numbered
    return _numbered(folder, r"checkpoint-(\d+)")


def _numbered(folder: Path, pattern: str, inside: str = "") -> Path | None:
    """Return the subfolder with the largest number, among those that contain ``inside``."""
    if not folder.is_dir():
        return None
    found = [
        (int(match[1]), child)
        for child in folder.iterdir()
        if (match := re.fullmatch(pattern, child.name)) and (child / inside).is_dir()
    ]
    return max(found)[1] if found else None


def _hub_snapshot(folder: Path) -> Path:
    """Return the snapshot of revision ``main`` in the hub's cache (``models--ORG--NAME``), or the
    only one.
    """
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="ascii", errors="replace").strip()
        for snapshot in snapshots:
            if snapshot.name == commit:
                return snapshot
    if len(snapshots) != 1:
        raise CheckpointError(
            f"{folder}: a Hugging Face cache with {len(snapshots)} snapshots, none of which is "
            f"refs/main; expected one of {[str(path) for path in snapshots]}"
        )
    return snapshots[0]


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
