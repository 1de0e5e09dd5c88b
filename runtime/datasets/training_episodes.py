"""The episodes of a LeRobotDataset as a training reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from policies.training.episode_source import DatasetColumns, Floats, Picture
from policies.types import CameraContract
from runtime.datasets.dataset_reader import DatasetReader
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import IMAGES, picture_key


class LeRobotEpisodes:
    """The episodes of a dataset in format v3.0, an ``EpisodeSource``.

    Args:
        root: The dataset's folder.
        cameras: The cameras that will be read.
        columns: The columns that will be read.

    Attributes:
        dt_s: 1 / fps.
        lengths: Frames of each episode.

    Raises:
        DatasetError: It is not such a dataset, has no such columns, or pictures of another size
            than the cameras; the methods also if a file cannot be read.
    """

    def __init__(
        self, root: Path, cameras: Sequence[CameraContract], columns: DatasetColumns
    ) -> None:
        self.name = str(root)
        self._reader, self._columns = DatasetReader(root), columns
        self._pictures = {camera.name: self._picture_column(camera) for camera in cameras}
        self.dt_s: float | None = 1 / self._reader.fps
        self.lengths = [int(episode["length"]) for episode in self._reader.episodes]

    def columns(self, index: int) -> tuple[Floats, Floats]:
        """Return the state (T, S) and the action (T, A)."""
        keys = self._columns.state, self._columns.action
        state, action = self._vectors(index, *keys)
        return state, action

    def object_poses(self, index: int) -> Floats:
        """Return the objects' poses, (T, 7 * objects)."""
        if self._columns.objects not in self._reader.info["features"]:
            raise DatasetError(
                f"{self.name}: got no column {self._columns.objects!r}, expected the objects' "
                "poses there (dataset_columns.objects); aux_weight: 0 needs none"
            )
        return self._vectors(index, self._columns.objects)[0]

    def pictures(self, index: int, camera: str) -> Iterator[Picture]:
        """Yield the pictures of ``camera``."""
        return self._reader.pictures(index, self._pictures[camera])

    def _vectors(self, index: int, *keys: str) -> list[Floats]:
        found = self._reader.columns(index, keys)
        return [
            np.ascontiguousarray(found[key], np.float32).reshape(len(found[key]), -1)
            for key in keys
        ]

    def _picture_column(self, camera: CameraContract) -> str:
        column = self._columns.cameras.get(camera.name, picture_key(camera.name))
        sizes = self._reader.cameras
        got = sizes.get(column.removeprefix(IMAGES))
        if got is None:
            raise DatasetError(
                f"{self.name}: camera {camera.name!r}: got no pictures {column!r}, expected one of "
                f"{list(sizes)} (dataset_columns.cameras has the column of each camera)"
            )
        if got not in camera.accepted_hw:
            raise DatasetError(
                f"{self.name}: camera {camera.name!r}: got pictures of {got}, expected "
                f"{' or '.join(map(str, camera.accepted_hw))}, its source_hw or model_hw"
            )
        return column
