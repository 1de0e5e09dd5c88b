"""Demonstrations of a source, with cropped images, held in memory: each picture is decoded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policies.errors import CheckpointError
from policies.image_resize import prepare
from policies.normalizer import Normalizer, from_stats
from policies.training.episode_source import EpisodeSource, Floats
from policies.types import CameraContract

POSE_DIM = 7
"""Numbers of an object's pose: x, y, z (m), quaternion wxyz."""
GB = 1e9


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
        source: Where the episodes are.
        cameras: Crop and size of each camera's images, all of one model size.
        chunk_size: Actions per chunk, T.
        with_objects: Whether to read the objects' poses.
        limit: Largest number of episodes; None for all.
        max_images_gb: Most memory for the images, in 10**9 bytes; None for what is free.
        progress: Called with (episodes read, episodes in all).

    Attributes:
        images: (M, N, h, w, 3) uint8 at the model's size, M time steps in all.
        state, actions, objects: (M, S), (M, A), (M, 3 * objects) float32, physical units.
        ends: (M,) index after the last time step of the same episode.
        stats: ``state`` and ``action`` to ``mean, std, min, max, q01, q99``.
        episodes: Number of episodes.

    Raises:
        CheckpointError: No episodes, one that differs in size or has a number that is not finite,
            or images larger than ``max_images_gb``. Besides, what ``source`` raises.
    """

    def __init__(
        self,
        source: EpisodeSource,
        cameras: Sequence[CameraContract],
        *,
        chunk_size: int,
        with_objects: bool = True,
        limit: int | None = None,
        max_images_gb: float | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        lengths = source.lengths[:limit]
        if not lengths:
            raise CheckpointError(f"{source.name}: got no episodes, expected at least one")
        self.chunk_size, self.episodes = chunk_size, len(lengths)
        shape = (sum(lengths), len(cameras), *cameras[0].model_hw, 3)
        _check_memory(shape, max_images_gb)
        self.images: NDArray[np.uint8] = np.empty(shape, np.uint8)
        self.ends = np.repeat(np.cumsum(lengths), lengths)
        parts: list[tuple[Floats, Floats, Floats]] = []
        first = 0
        for index, length in enumerate(lengths):
            parts.append(_numbers(source, index, length, with_objects))
            _fill(self.images[first : first + length], source, index, cameras)
            first += length
            progress(index + 1, len(lengths))
        try:
            self.state, self.actions, self.objects = (
                np.concatenate(columns) for columns in zip(*parts, strict=True)
            )
        except ValueError as error:
            raise CheckpointError(f"{source.name}: episodes differ in size: {error}") from error
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


def _numbers(
    source: EpisodeSource, index: int, length: int, with_objects: bool
) -> tuple[Floats, Floats, Floats]:
    """Return the state, the actions and the objects' positions of an episode."""
    state, actions = source.columns(index)
    objects = np.zeros((length, 0), np.float32)
    if with_objects:
        poses = source.object_poses(index)
        if poses.ndim != 2 or poses.shape[1] % POSE_DIM:
            raise CheckpointError(
                f"{source.name}: episode {index}: objects: got the shape {poses.shape}, expected "
                f"{POSE_DIM} numbers for each object; aux_weight: 0 needs none"
            )
        objects = poses.reshape(len(poses), -1, POSE_DIM)[:, :, :3].reshape(len(poses), -1)
    for what, rows in (("state", state), ("action", actions), ("objects", objects)):
        if rows.ndim != 2 or len(rows) != length:
            raise CheckpointError(
                f"{source.name}: episode {index}: {what}: got the shape {rows.shape}, expected "
                f"{length} rows of numbers"
            )
        if not np.isfinite(rows).all():
            row = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
            raise CheckpointError(
                f"{source.name}: episode {index}: {what}: got {rows[row]} in row {row}, expected "
                "finite numbers"
            )
    return state, actions, objects


def _fill(
    images: NDArray[np.uint8], source: EpisodeSource, index: int, cameras: Sequence[CameraContract]
) -> None:
    """Read the pictures of an episode into ``images`` (T, N, h, w, 3)."""
    for number, camera in enumerate(cameras):
        count = 0
        for count, picture in enumerate(source.pictures(index, camera.name), 1):
            if count <= len(images):
                prepare(picture, camera, out=images[count - 1, number])
        if count != len(images):
            raise CheckpointError(
                f"{source.name}: episode {index}: camera {camera.name!r}: got {count} pictures, "
                f"expected {len(images)}"
            )


def _check_memory(shape: tuple[int, ...], max_gb: float | None) -> None:
    limit, why = (_free_gb(), "free memory") if max_gb is None else (max_gb, "max_images_gb")
    needed = np.prod(shape, dtype=np.int64) / GB
    if needed > limit:
        frames, cameras, height, width, _ = shape
        raise CheckpointError(
            f"images: got {needed:.2f} GB ({frames} frames, {cameras} cameras of {height} x "
            f"{width}), expected at most {limit:.2f} GB ({why}); use fewer episodes "
            "(max_episodes) or a smaller model_hw"
        )


def _free_gb() -> float:
    """Return the memory that the kernel says is available."""
    rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(row for row in rows if row.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024 / GB


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
