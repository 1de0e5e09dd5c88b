"""What a training reads its episodes from, whatever format they are stored in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""


class EpisodeSource(Protocol):
    """Episodes by index from 0. Its methods raise the source's own errors, with the file's name."""

    @property
    def name(self) -> str:
        """Where the episodes are, for errors."""

    @property
    def dt_s(self) -> float | None:
        """Seconds per row; None where the source does not say it."""

    @property
    def lengths(self) -> Sequence[int]:
        """The number of rows of each episode."""

    def columns(self, index: int) -> tuple[Floats, Floats]:
        """Return the state (T, S) and the action (T, A), float32, physical units."""

    def object_poses(self, index: int) -> Floats:
        """Return the objects' poses, (T, 7 * objects) float32: x, y, z (m), quaternion wxyz."""

    def pictures(self, index: int, camera: str) -> Iterator[Picture]:
        """Yield the T pictures of ``camera``, at its source size."""


@dataclass(frozen=True, slots=True)
class DatasetColumns:
    """The columns of a LeRobotDataset that are learned from.

    Attributes:
        state, action: Vectors, or single numbers.
        objects: The objects' poses, for the auxiliary task.
        cameras: Name of a camera to its column; ``observation.images.NAME`` where it is not given.
    """

    state: str = "observation.state"
    action: str = "action"
    objects: str = "observation.environment_state"
    cameras: Mapping[str, str] = field(default_factory=dict)
