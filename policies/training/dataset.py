"""Reads demonstrations in ACT's HDF5 layout, crops their images and holds them in memory.

A file has ``observations/qpos`` (T, S), ``observations/images/<camera>`` (T, H, W, 3) uint8 and
``action`` (T, A). The auxiliary task also needs ``metronome/object_qpos`` (T, 7 * objects).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import CheckpointError
from policies.image_resize import prepare
from policies.normalizer import Normalizer, from_stats
from policies.types import CameraContract

OBJECTS = "metronome/object_qpos"
POSE_DIM = 7
"""Numbers of an object's pose: x, y, z (m), quaternion wxyz."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A batch of B time steps; ``state``, ``actions`` and ``objects`` are normalized float32.

    Attributes:
        images: (B, N, h, w, 3) uint8.
        state: (B, S).
        actions: (B, T, A), zero where padded.
        padded: (B, T) bool, True after the episode's end.
        objects: (B, 3 * objects) positions.
    """

    images: NDArray[np.uint8]
    state: Floats
    actions: Floats
    padded: NDArray[np.bool_]
    objects: Floats


class Demonstrations:
    """All episodes, concatenated.

    Args:
        folder: Folder with the ``*.hdf5`` files.
        cameras: Crop and size of each camera's images.
        chunk_size: Actions per chunk, T.
        with_objects: Whether to read the objects' poses.
        limit: Largest number of episodes; None for all.
        progress: Called with (episodes read, episodes in all).

    Attributes:
        images: (M, N, h, w, 3) uint8 at the model's size, M time steps in all.
        state, actions, objects: (M, S), (M, A), (M, 3 * objects) float32, physical units.
        ends: (M,) index after the last time step of the same episode.
        stats: ``state`` and ``action`` to ``mean, std, min, max, q01, q99``.
        episodes: Number of episodes.

    Raises:
        CheckpointError: No episodes, or one that lacks a data set or differs in size.
    """

    def __init__(
        self,
        folder: Path,
        cameras: Sequence[CameraContract],
        *,
        chunk_size: int,
        with_objects: bool = True,
        limit: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        paths = sorted(folder.glob("*.hdf5"), key=lambda p: (len(p.name), p.name))[:limit]
        if not paths:
            raise CheckpointError(f"{folder}: no *.hdf5 episodes")
        self.chunk_size, self.episodes = chunk_size, len(paths)
        parts: list[dict[str, NDArray[Any]]] = []
        for path in paths:
            parts.append(_read(path, cameras, with_objects))
            progress(len(parts), len(paths))
        try:
            joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        except ValueError as error:
            raise CheckpointError(f"{folder}: episodes differ in size: {error}") from error
        self.images: NDArray[np.uint8] = joined["images"]
        self.state: Floats = joined["state"]
        self.actions: Floats = joined["actions"]
        self.objects: Floats = joined["objects"]
        lengths = [len(part["state"]) for part in parts]
        self.ends = np.repeat(np.cumsum(lengths), lengths)
        self.stats = {"state": _stats(self.state), "action": _stats(self.actions)}
        self._state = from_stats("zscore", self.stats["state"]).normalize(self.state)
        self._actions = from_stats("zscore", self.stats["action"]).normalize(self.actions)
        self._objects = self.objects
        if self.objects.shape[1]:
            self._objects = self.object_normalizer().normalize(self.objects)

    def __len__(self) -> int:
        return len(self.state)

    def object_normalizer(self) -> Normalizer:
        """Return the z-score normalizer of ``objects``."""
        return from_stats("zscore", _stats(self.objects))

    def batch(
        self,
        rng: np.random.Generator,
        size: int,
        *,
        shift_px: int = 0,
        brightness: float = 0.0,
    ) -> Batch:
        """Return ``size`` time steps drawn at random.

        Args:
            rng: Source of all random numbers.
            size: B.
            shift_px: Each image is shifted by up to this many pixels, with its border repeated.
            brightness: Each image is multiplied by a factor from 1 - this to 1 + this.
        """
        at = rng.integers(0, len(self), size)
        future = at[:, None] + np.arange(self.chunk_size)
        padded = future >= self.ends[at][:, None]
        actions = self._actions[np.minimum(future, len(self) - 1)]
        actions[padded] = 0
        return Batch(
            images=_augment(self.images[at], rng, shift_px, brightness),
            state=self._state[at],
            actions=actions,
            padded=padded,
            objects=self._objects[at],
        )


def _read(
    path: Path, cameras: Sequence[CameraContract], with_objects: bool
) -> dict[str, NDArray[Any]]:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            state = np.asarray(file["observations/qpos"], dtype=np.float32)
            actions = np.asarray(file["action"], dtype=np.float32)
            frames = []
            for camera in cameras:
                source = file[f"observations/images/{camera.name}"]
                frames.append(np.stack([prepare(source[t], camera) for t in range(len(source))]))
            objects = np.zeros((len(state), 0), np.float32)
            if with_objects:
                poses = np.asarray(file[OBJECTS], dtype=np.float32)
                objects = poses.reshape(len(state), -1, POSE_DIM)[:, :, :3].reshape(len(state), -1)
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    lengths = {len(state), len(actions), *(len(f) for f in frames)}
    if len(lengths) != 1:
        raise CheckpointError(f"{path}: got {sorted(lengths)} rows, expected one number")
    return {
        "state": state,
        "actions": actions,
        "objects": objects,
        "images": np.stack(frames, axis=1),
    }


def _stats(data: Floats) -> Mapping[str, list[float]]:
    wide = data.astype(np.float64)
    return {
        "mean": wide.mean(0).tolist(),
        "std": wide.std(0).tolist(),
        "min": wide.min(0).tolist(),
        "max": wide.max(0).tolist(),
        "q01": np.quantile(wide, 0.01, axis=0).tolist(),
        "q99": np.quantile(wide, 0.99, axis=0).tolist(),
    }


def _augment(
    images: NDArray[np.uint8], rng: np.random.Generator, shift_px: int, brightness: float
) -> NDArray[np.uint8]:
    """Return ``images`` (B, N, h, w, 3) with each image shifted and brightened independently."""
    if shift_px:
        height, width = images.shape[2:4]
        pad = ((0, 0), (0, 0), (shift_px, shift_px), (shift_px, shift_px), (0, 0))
        wide = np.pad(images, pad, mode="edge")
        images = np.empty_like(images)
        for index in np.ndindex(images.shape[:2]):
            y, x = rng.integers(0, 2 * shift_px + 1, 2)
            images[index] = wide[index][y : y + height, x : x + width]
    if brightness:
        factor = rng.uniform(1 - brightness, 1 + brightness, (*images.shape[:2], 1, 1, 1))
        images = np.clip(images * factor.astype(np.float32), 0, 255).astype(np.uint8)
    return images
