"""Which folder holds a checkpoint's weights. Without torch, which is slow to import."""

from __future__ import annotations

import re
from pathlib import Path

from policies.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the files that the weights are spread over, where they are."""
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")


def user_path(text: str) -> Path:
    """``text`` as a path, ``~`` and ``~user`` expanded: no shell does it in ``--flag=~/x``.

    Raises:
        CheckpointError: There is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{text}: {error}") from error


def find_folder(path: Path) -> Path:
    """The folder that holds the weights: ``path``, or the one below it that a trainer or the hub's
    cache put them into.

    Raises:
        CheckpointError: No folder, or a cache of several snapshots.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: got a file, expected a checkpoint's folder, e.g. {path.absolute().parent}"
        )
    below: Path | None = path
    while below is not None:
        path, below = below, _one_below(below)
    return path


def _one_below(folder: Path) -> Path | None:
    """Where to look next; None where the weights should be in ``folder`` itself."""
    if (folder / "config.json").is_file() and _has_weights(folder):
        return None
    if (folder / "snapshots").is_dir():
        return _hub_snapshot(folder)
    if (folder / "pretrained_model").is_dir():
        return folder / "pretrained_model"
    # LeRobot's output folder: checkpoints/NUMBER/pretrained_model, and a link "last".
    for steps in (folder / "checkpoints", folder):
        numbered = _numbered(steps, r"(\d+)", "pretrained_model")
        if (steps / "last" / "pretrained_model").is_dir():
            return steps / "last"
        if numbered:
            return numbered
    return _numbered(folder, r"checkpoint-(\d+)")


def _numbered(folder: Path, pattern: str, inside: str = "") -> Path | None:
    """The folder of the largest number, of those that have ``inside`` in them."""
    if not folder.is_dir():
        return None
    found = [
        (int(match[1]), child)
        for child in folder.iterdir()
        if (match := re.fullmatch(pattern, child.name)) and (child / inside).is_dir()
    ]
    return max(found)[1] if found else None


def _hub_snapshot(folder: Path) -> Path:
    """The revision ``main`` of a model in the hub's cache (``models--ORG--NAME``), or its only."""
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="ascii", errors="replace").strip()
        for snapshot in snapshots:
            if snapshot.name == commit:
                return snapshot
    if len(snapshots) != 1:
        raise CheckpointError(
            f"{folder}: a cache of the hub with {len(snapshots)} snapshots, none of which is "
            f"refs/main; expected one of {[str(path) for path in snapshots]}"
        )
    return snapshots[0]


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
