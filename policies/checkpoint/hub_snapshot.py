"""Recognizes folders that the Hugging Face hub's cache holds, whose pickles are not opened."""

from __future__ import annotations

from pathlib import Path

from policies.errors import CheckpointError


def in_hub_snapshot(path: Path) -> bool:
    """Whether ``path`` lies in ``models--ORG--NAME/snapshots/REVISION``; links are not followed."""
    parents = path.absolute().parents
    return any(
        above.name == "snapshots" and above.parent.name.startswith("models--") for above in parents
    )


def refuse_hub_pickle(path: Path) -> None:
    """Raise ``CheckpointError`` if ``path``, a pickle, comes from the hub.

    Anybody can publish a pickle there, and a pickle can contain code.
    """
    if in_hub_snapshot(path):
        raise CheckpointError(
            f"{path}: got a pickle in a snapshot of the Hugging Face hub, expected safetensors and "
            "JSON only: pickles of the hub are neither downloaded nor opened; if you trust its "
            "authors, copy the files to a folder outside the cache"
        )
