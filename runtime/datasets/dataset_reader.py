"""Reads a dataset in LeRobot's format v3.0, its own or LeRobot's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.datasets import layout
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import EPISODE, IMAGES
from runtime.datasets.pictures import Picture, decode_png, decode_video


class DatasetReader:
    """A dataset on disk. Episodes that are finished later are not seen.

    Args:
        root: The dataset's folder.

    Attributes:
        root: As given.
        info: ``meta/info.json``.
        episodes: The entries of ``meta/episodes``, by column.
        tasks: The instructions, by ``task_index``.

    Raises:
        DatasetError: It is not a dataset of this version, or a file cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = layout.read_info(root)
        with _naming(root):
            self.episodes = layout.read_episodes(root, int(self.info["total_episodes"]))
            self.tasks = layout.read_tasks(root)
            self._features: Mapping[str, Mapping[str, Any]] = self.info["features"]
            self.fps = float(self.info["fps"])

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Camera name to (height, width): columns of pictures, without their common prefix."""
        return {
            key.removeprefix(IMAGES): (int(one["shape"][0]), int(one["shape"][1]))
            for key, one in self._features.items()
            if one["dtype"] in ("image", "video")
        }

    def width(self, key: str) -> int:
        """Return the numbers per frame in column ``key``. Raises ``DatasetError``: no such one."""
        if key not in self._features:
            raise DatasetError(f"{self.root}: got no column {key!r}, expected it in {self._names}")
        return int(np.prod(self._features[key]["shape"]))

    @property
    def _names(self) -> list[str]:
        return list(self._features)

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        """Return the columns of numbers of episode ``index``, (n,) or (n, D) each.

        Raises:
            DatasetError: No such episode, or a file cannot be read.
        """
        numbers = [
            key
            for key, one in self._features.items()
            if one["dtype"] not in ("image", "video", "string")
        ]
        table = self._rows(index, numbers)
        return {key: _array(table[key]) for key in numbers}

    def pictures(self, index: int, camera: str) -> Iterator[Picture]:
        """Yield the pictures of ``camera`` in episode ``index``, (H, W, 3) uint8, one per frame.

        Raises:
            DatasetError: No such episode or camera, or a file cannot be read.
        """
        key = IMAGES + camera
        if key not in self._features and camera in self._features:
            key = camera
        self.width(key)
        if self._features[key]["dtype"] == "image":
            with _naming(self.root):
                for cell in self._rows(index, [key])[key].to_pylist():
                    yield decode_png(cell["bytes"])
            return
        episode = self._episode(index)
        path = self.root / layout.video_path(self.info, episode, key)
        first = round(episode[f"videos/{key}/from_timestamp"] * self.fps)
        last, number = first + int(episode["length"]), 0
        with _naming(path):
            for number, picture in enumerate(decode_video(path), 1):
                if number > first:
                    yield picture
                if number == last:
                    return
        raise DatasetError(f"{path}: got {number} frames, expected at least {last}")

    def _episode(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise DatasetError(f"{self.root}: episode: got {index}, expected 0 to {len(self) - 1}")
        return self.episodes[index]

    def _rows(self, index: int, keys: list[str]) -> Any:
        from pyarrow import compute, parquet

        episode = self._episode(index)
        path = self.root / layout.data_path(self.info, episode)
        with _naming(path):
            table = parquet.read_table(path, columns=list(dict.fromkeys([*keys, EPISODE])))
            table = table.filter(compute.equal(table[EPISODE], index))
        if table.num_rows != episode["length"]:
            raise DatasetError(
                f"{path}: episode {index}: got {table.num_rows} rows, expected {episode['length']}"
            )
        return table


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into a ``DatasetError`` with its path."""
    import av
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, av.FFmpegError, OSError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {error!r}") from error


def _array(column: Any) -> NDArray[Any]:
    """A column of pyarrow as (n,) or (n, D)."""
    import pyarrow as pa

    rows = len(column)
    whole = column.combine_chunks()
    if pa.types.is_fixed_size_list(whole.type) or pa.types.is_list(whole.type):
        return np.asarray(whole.flatten().to_numpy(zero_copy_only=False)).reshape(rows, -1)
    return np.asarray(whole.to_numpy(zero_copy_only=False))
