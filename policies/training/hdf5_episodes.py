"""Episodes in ACT's HDF5 layout, one file each.

A file has ``observations/qpos`` (T, S), ``observations/images/<camera>`` (T, H, W, 3) uint8 and
``action`` (T, A). The auxiliary task also needs ``metronome/object_qpos`` (T, 7 * objects).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import CheckpointError
from policies.training.episode_source import Floats, Picture

STATE, ACTION = "observations/qpos", "action"
IMAGES = "observations/images"
OBJECTS = "metronome/object_qpos"


class Hdf5Episodes:
    """The episodes of a folder, an ``EpisodeSource``.

    Args:
        folder: Folder with the ``*.hdf5`` files, which are sorted by their numbers.

    Attributes:
        dt_s: None: ACT's layout has no rate.
        lengths: Rows of each episode.

    Raises:
        CheckpointError: There are none, or a file cannot be read; so do the methods.
    """

    dt_s: float | None = None

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        try:
            self._paths = sorted(folder.glob("*.hdf5"), key=lambda p: (len(p.name), p.name))
        except OSError as error:
            raise CheckpointError(f"{folder}: {error.strerror}, expected a folder") from error
        if not self._paths:
            raise CheckpointError(f"{folder}: no *.hdf5 episodes")
        self.lengths = [self._length(index) for index in range(len(self._paths))]

    def columns(self, index: int) -> tuple[Floats, Floats]:
        """Return the state (T, S) and the action (T, A)."""
        with self._open(index) as file:
            return np.asarray(file[STATE], np.float32), np.asarray(file[ACTION], np.float32)

    def object_poses(self, index: int) -> Floats:
        """Return the objects' poses, (T, 7 * objects)."""
        with self._open(index) as file:
            return np.asarray(file[OBJECTS], np.float32)

    def pictures(self, index: int, camera: str) -> Iterator[Picture]:
        """Yield the pictures of ``camera``."""
        with self._open(index) as file:
            stored = file[f"{IMAGES}/{camera}"]
            for row in range(len(stored)):
                yield stored[row]

    def _length(self, index: int) -> int:
        with self._open(index) as file:
            lengths = {len(file[STATE]), len(file[ACTION])}
        if len(lengths) != 1:
            raise CheckpointError(
                f"{self._paths[index]}: got {sorted(lengths)} rows, expected one number"
            )
        return lengths.pop()

    @contextlib.contextmanager
    def _open(self, index: int) -> Iterator[Any]:
        import h5py

        path = self._paths[index]
        try:
            with h5py.File(path, "r") as file:
                yield file
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: {error}") from error
