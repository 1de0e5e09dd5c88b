"""Reads a dataset in LeRobot's format v3.0, its own or LeRobot's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.datasets import layout
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import EPISODE, IMAGES
from runtime.datasets.pictures import Picture, decode_png, decode_video

PICTURES = ("image", "video")
"""Types of a column of pictures."""


class DatasetReader:
    """A dataset on disk. Episodes that are finished later are not seen.

    Args:
        root: The dataset's folder.

    Attributes:
        root: As given.
        info: ``meta/info.json``.
        fps: Frames per second.
        episodes: The entries of ``meta/episodes``, by column.
        tasks: The instructions, by ``task_index``.

    Raises:
        DatasetError: It is not a dataset of this version, or a file cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = layout.read_info(root)
        with _naming(root):
            total = int(self.info["total_episodes"])
            self.episodes = layout.read_episodes(root, total)
            # LeRobot writes none before the first episode.
            self.tasks = layout.read_tasks(root) if total else []
            self._features: Mapping[str, Mapping[str, Any]] = self.info["features"]
            self._types = {key: str(one["dtype"]) for key, one in self._features.items()}
            self.fps = float(self.info["fps"])
            if not 0 < self.fps < np.inf:
                raise ValueError(f"fps: got {self.fps}, expected more than 0")

    def __len__(self) -> int:
        return len(self.episodes)

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Camera name to (height, width): columns of pictures, without their common prefix."""
        return {
            key.removeprefix(IMAGES): _height_width(one)
            for key, one in self._features.items()
            if self._types[key] in PICTURES
        }

    def width(self, key: str) -> int:
        """Return the numbers per frame in column ``key``. Raises ``DatasetError``: no such one."""
        if key not in self._features:
            raise DatasetError(f"{self.root}: got no column {key!r}, expected it in {self._names}")
        return int(np.prod(self._features[key]["shape"]))

    @property
    def _names(self) -> list[str]:
        return list(self._features)

    def columns(self, index: int, keys: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Return the columns ``keys`` of episode ``index``, (n,) or (n, D) each.

        Args:
            index: The episode's.
            keys: Columns of numbers; None for all.

        Raises:
            DatasetError: No such episode or column, one of another width, or a file cannot be read.
        """
        numbers = [key for key, one in self._types.items() if one not in (*PICTURES, "string")]
        if keys is not None and (unknown := [key for key in keys if key not in numbers]):
            raise DatasetError(
                f"{self.root}: got no column of numbers {unknown[0]!r}, expected one of {numbers}"
            )
        path, table = self._rows(index, numbers if keys is None else list(keys))
        found = {}
        for key in table.column_names if keys is None else keys:
            with _naming(path):
                found[key] = _array(table[key])
            got, expected = found[key].size, len(table) * self.width(key)
            if got != expected:
                raise DatasetError(
                    f"{path}: {key}: got {got} numbers in {len(table)} rows, expected {expected}"
                )
        return found

    def pictures(self, index: int, camera: str) -> Iterator[Picture]:
        """Yield the pictures of ``camera`` in episode ``index``, (H, W, 3) uint8, one per frame.

        Raises:
            DatasetError: No such episode or camera, or a file cannot be read.
        """
        key = IMAGES + camera
        if key not in self._features and camera in self._features:
            key = camera
        self.width(key)
        if self._types[key] == "video":
            yield from self._video(index, key)
            return
        path, table = self._rows(index, [key])
        for cell in table[key].to_pylist():
            with _naming(path):
                picture = decode_png(cell["bytes"])
            yield picture

    def _video(self, index: int, key: str) -> Iterator[Picture]:
        """Yield the frames of an episode, which are found by their times, as LeRobot does it."""
        episode = self._episode(index)
        with _naming(self.root):
            path = self.root / layout.video_path(self.info, episode, key)
            start_s = float(episode[f"videos/{key}/from_timestamp"])
            length = int(episode["length"])
        count = 0
        with _naming(path):
            for time_s, picture in decode_video(path, start_s - 0.5 / self.fps):
                if round((time_s - start_s) * self.fps) != count:
                    break
                yield picture
                count += 1
                if count == length:
                    return
        raise DatasetError(
            f"{path}: episode {index}: got {count} frames from {start_s:g} s on at {self.fps:g} "
            f"fps, expected {length}"
        )

    def _episode(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise DatasetError(f"{self.root}: episode: got {index}, expected 0 to {len(self) - 1}")
        return self.episodes[index]

    def _rows(self, index: int, keys: list[str]) -> tuple[Path, Any]:
        """Return the file of an episode and the table of its rows."""
        from pyarrow import parquet

        episode = self._episode(index)
        with _naming(self.root):
            path = self.root / layout.data_path(self.info, episode)
        with _naming(path):
            # With a filter only those parts of a file are read that may have the episode.
            table = parquet.read_table(
                path,
                columns=list(dict.fromkeys([*keys, EPISODE])),
                filters=[(EPISODE, "=", index)],
                partitioning=None,
            )
        if table.num_rows != episode["length"]:
            raise DatasetError(
                f"{path}: episode {index}: got {table.num_rows} rows, expected {episode['length']}"
            )
        return path, table


def _height_width(feature: Mapping[str, Any]) -> tuple[int, int]:
    """The size of pictures; LeRobot takes channels as the last and as the first dimension."""
    shape, names = feature["shape"], feature.get("names") or []
    first = 1 if names and str(names[0]).startswith("channel") else 0
    return int(shape[first]), int(shape[first + 1])


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into a ``DatasetError`` with its path."""
    import av
    import pyarrow as pa

    try:
        yield
    except (
        pa.ArrowException,
        av.FFmpegError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise DatasetError(f"{path}: cannot be read: {error!r}") from error


def _array(column: Any) -> NDArray[Any]:
    """A column of pyarrow as (n,) or (n, D)."""
    import pyarrow as pa

    rows = len(column)
    whole = column.combine_chunks()
    if pa.types.is_fixed_size_list(whole.type) or pa.types.is_list(whole.type):
        return np.asarray(whole.flatten().to_numpy(zero_copy_only=False)).reshape(rows, -1)
    return np.asarray(whole.to_numpy(zero_copy_only=False))
