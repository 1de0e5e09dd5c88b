"""Writes a dataset in LeRobot's format v3.0, episode by episode.

LeRobot reads every parquet file that it finds, and an unfinished one has no footer. So each file is
finished in a folder of its own and then renamed: videos, rows, the episode's entry, the statistics
and last ``info.json``, which counts the episodes. Killed at any moment, this leaves a dataset with
the episodes before; the next writer removes the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.datasets import layout
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import (
    COUNTED,
    EPISODE,
    FRAME,
    GIVEN,
    INDEX,
    TASK,
    TIMESTAMP,
    DatasetFeatures,
    check_same,
    plain_rate,
)
from runtime.datasets.pictures import Picture, encode_png, encode_video
from runtime.datasets.spooled_episode import SpooledEpisode
from runtime.datasets.statistics import (
    NAMES,
    PictureStatistics,
    Statistics,
    column_statistics,
    combine,
    combine_all,
)

Columns = Mapping[str, NDArray[Any]]
Pictures = Mapping[str, Callable[[], Iterator[Picture]]]
"""Camera name to a function that goes through its pictures, one per frame."""
OURS = {"data", "videos", "meta", layout.WORK_FOLDER}


class DatasetWriter:
    """A dataset that is new, or continued.

    Args:
        root: The dataset's folder; created if there is none.
        features: What every episode has in common.

    Attributes:
        episodes, frames: How many there are.

    Raises:
        DatasetError: The folder has other files or other features, or somebody else writes to it.
        OSError: The folder cannot be written.
    """

    def __init__(self, root: Path, features: DatasetFeatures) -> None:
        self.root, self._features = root, features
        self._lock = _lock(root)
        try:
            self._work = root / layout.WORK_FOLDER / "writer"
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self) -> None:
        root, features = self.root, self._features
        self.episodes = self.frames = 0
        self._tasks: list[str] = []
        self._statistics: dict[str, Statistics] = {}
        streams = ["data", "meta/episodes"]
        if not features.lossless:
            streams += [f"videos/{key}" for key in features.picture_keys.values()]
        self._places = dict.fromkeys(streams, (0, 0))
        if (root / layout.INFO).exists():
            self._continue()
        elif others := sorted({path.name for path in root.iterdir()} - OURS):
            raise DatasetError(
                f"{root}: got a folder with {others[:3]}, expected a new one or a LeRobotDataset"
            )
        layout.remove_abandoned_spools(root)
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        for _, path in self._paths():
            path.unlink(missing_ok=True)  # of an episode that was not finished

    def _continue(self) -> None:
        info = layout.read_info(self.root)
        check_same(self.root, info, self._features)
        self.episodes, self.frames = info["total_episodes"], info["total_frames"]
        self._tasks = layout.read_tasks(self.root)
        if not self.episodes:
            return
        self._statistics = self._read_statistics()
        last = layout.read_last_episode(self.root, self.episodes)
        for stream in self._places:
            place = last[f"{stream}/chunk_index"], last[f"{stream}/file_index"]
            self._places[stream] = layout.next_file(place)

    def _read_statistics(self) -> dict[str, Statistics]:
        """Return ``stats.json``; if it was written for an episode that was not finished, the same
        from the episodes' own.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads((self.root / layout.STATS).read_text(encoding="utf-8"))
            if stored[INDEX]["count"] == [self.frames]:
                return {
                    key: {name: np.asarray(values[name], np.float64) for name in NAMES}
                    for key, values in stored.items()
                }
        rows = layout.read_episodes(self.root, self.episodes)
        return combine_all(_statistics_of(row) for row in rows)

    def _paths(self) -> Iterator[tuple[str, Path]]:
        """The files of the next episode: videos, then rows, then its entry."""
        for stream in reversed(self._places):
            chunk_index, file_index = self._places[stream]
            kind, _, key = stream.partition("/")
            if stream == "data":
                template = layout.DATA_PATH
            else:
                template = layout.VIDEO_PATH if kind == "videos" else layout.EPISODES_PATH
            name = template.format(video_key=key, chunk_index=chunk_index, file_index=file_index)
            yield stream, self.root / name

    def add(self, columns: Columns, pictures: Pictures, task: str) -> int:
        """Write one episode of n frames; it is in the dataset when this returns.

        Args:
            columns: ``GIVEN`` and the vectors, (n,) or (n, D), one row per frame.
            pictures: Camera name to its n pictures, gone through once.
            task: The instruction in words.

        Returns:
            The episode's index.

        Raises:
            DatasetError: A column is missing, or differs in its length or width.
            OSError: The disk is full, or cannot be written.
        """
        from pyarrow import parquet

        self._check(columns, pictures)
        index, length = self.episodes, len(columns["action"])
        tasks = self._tasks if task in self._tasks else [*self._tasks, task]
        rows: dict[str, Any] = {**columns, **self._count(length, tasks.index(task))}
        statistics = {key: column_statistics(column) for key, column in rows.items()}
        paths = dict(self._paths())
        partial = {stream: self._work / f"{stream.replace('/', '_')}.partial" for stream in paths}
        for name, key in self._features.picture_keys.items():
            counted = PictureStatistics()
            seen = _counting(pictures[name](), counted)
            if self._features.lossless:
                rows[key] = [{"bytes": encode_png(picture), "path": None} for picture in seen]
            else:
                video = partial[f"videos/{key}"].with_suffix(".mp4")
                partial[f"videos/{key}"] = video
                encode_video(video, seen, self._features.frame_rate)
            statistics[key] = counted.result()
        parquet.write_table(self._table(rows), partial["data"])
        entry = self._entry(length, task, statistics)
        parquet.write_table(_entry_table(entry), partial["meta/episodes"])
        self._commit(paths, partial, tasks, statistics, length)
        return index

    def take(self, episode: SpooledEpisode) -> int:
        """Write a spooled episode, and remove its folder.

        Returns:
            The episode's index.

        Raises:
            DatasetError, OSError: As ``add``.
            ValueError: Its pictures cannot be read.
        """
        pictures = {
            name: functools.partial(episode.pictures, name, hw)
            for name, hw in self._features.cameras.items()
        }
        index = self.add(episode.columns, pictures, episode.task)
        shutil.rmtree(episode.folder)
        return index

    def _check(self, columns: Columns, pictures: Pictures) -> None:
        vectors = self._features.vectors
        expected = {
            **{key: (len(names),) for key, names in vectors.items()},
            **dict.fromkeys(GIVEN, ()),
        }
        if set(columns) != set(expected) or set(pictures) != set(self._features.cameras):
            raise DatasetError(
                f"{self.root}: got the columns {sorted((*columns, *pictures))}, expected "
                f"{sorted((*expected, *self._features.cameras))}"
            )
        length = len(columns["action"])
        for key, shape in expected.items():
            if not length or columns[key].shape != (length, *shape):
                raise DatasetError(
                    f"{self.root}: {key}: got the shape {columns[key].shape}, expected "
                    f"{(length, *shape)} with at least one row"
                )

    def _count(self, length: int, task_index: int) -> dict[str, NDArray[Any]]:
        frames = np.arange(length)
        return {
            TIMESTAMP: (frames / self._features.fps).astype(np.float32),
            FRAME: frames,
            EPISODE: np.full(length, self.episodes),
            INDEX: frames + self.frames,
            TASK: np.full(length, task_index),
        }

    def _table(self, rows: Mapping[str, Any]) -> Any:
        import pyarrow as pa

        types = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64()}
        types["bool"] = pa.bool_()
        columns = {}
        for key, names in self._features.vectors.items():
            flat = pa.array(np.ascontiguousarray(rows[key], np.float32).ravel())
            wide = len(names) > 1
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, len(names)) if wide else flat
        if self._features.lossless:
            picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
            for key in self._features.picture_keys.values():
                columns[key] = pa.array(rows[key], picture)
        for key, dtype in (GIVEN | COUNTED).items():
            columns[key] = pa.array(np.asarray(rows[key]), types[dtype])
        return pa.table(columns)

    def _entry(
        self, length: int, task: str, statistics: Mapping[str, Statistics]
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "episode_index": self.episodes,
            "tasks": [task],
            "length": length,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + length,
        }
        for stream, (chunk_index, file_index) in self._places.items():
            entry[f"{stream}/chunk_index"] = chunk_index
            entry[f"{stream}/file_index"] = file_index
            if stream.startswith("videos/"):
                entry[f"{stream}/from_timestamp"] = 0.0
                entry[f"{stream}/to_timestamp"] = length / self._features.fps
        for key, values in statistics.items():
            for name, value in values.items():
                entry[f"stats/{key}/{name}"] = _plain(name, value)
        return entry

    def _commit(
        self,
        paths: Mapping[str, Path],
        partial: Mapping[str, Path],
        tasks: list[str],
        statistics: Mapping[str, Statistics],
        length: int,
    ) -> None:
        from pyarrow import parquet

        old = self._statistics
        together = {
            key: combine([old[key], new] if key in old else [new])
            for key, new in statistics.items()
        }
        tasks_file, json_file = self._work / "tasks.partial", self._work / "json.partial"
        if tasks != self._tasks:
            parquet.write_table(layout.tasks_table(tasks), tasks_file)
            _move(tasks_file, self.root / layout.TASKS)
        for stream, path in paths.items():
            _move(partial[stream], path)
        plain = {
            key: {name: _plain(name, value) for name, value in values.items()}
            for key, values in together.items()
        }
        info = self._info(self.episodes + 1, self.frames + length, len(tasks))
        for name, content in ((layout.STATS, plain), (layout.INFO, info)):
            json_file.write_text(
                json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8"
            )
            _move(json_file, self.root / name)
        self.episodes, self.frames = self.episodes + 1, self.frames + length
        self._tasks, self._statistics = tasks, together
        self._places = {name: layout.next_file(place) for name, place in self._places.items()}

    def _info(self, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
        return {
            "codebase_version": layout.VERSION,
            "robot_type": self._features.robot_type,
            "total_episodes": episodes,
            "total_frames": frames,
            "total_tasks": tasks,
            "chunks_size": layout.CHUNK_FILES,
            "data_files_size_in_mb": layout.DATA_MB,
            "video_files_size_in_mb": layout.VIDEO_MB,
            "fps": plain_rate(self._features.fps),
            "splits": {"train": f"0:{episodes}"},
            "data_path": layout.DATA_PATH,
            "video_path": None if self._features.lossless else layout.VIDEO_PATH,
            "features": self._features.describe(),
        }

    def close(self) -> None:
        """Remove what is unfinished, and let others write. Idempotent."""
        if self._lock < 0:
            return
        shutil.rmtree(self._work, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._work.parent.rmdir()  # unless an episode was not recorded
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_written_to(root: Path) -> bool:
    """Whether a ``DatasetWriter`` has ``root`` open, in any process."""
    try:
        os.close(_lock(root))
    except DatasetError:
        return True
    return False


def _lock(root: Path) -> int:
    """Create ``root`` and lock it; return the descriptor that holds the lock."""
    root.mkdir(parents=True, exist_ok=True)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise DatasetError(
            f"{root}: another process writes to this dataset, expected none"
        ) from None
    return fd


def _move(source: Path, target: Path) -> None:
    """Rename a finished file, once its content is on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _counting(pictures: Iterator[Picture], counted: PictureStatistics) -> Iterator[Picture]:
    for picture in pictures:
        counted.add(picture)
        yield picture


def _plain(name: str, value: NDArray[np.float64]) -> Any:
    return [int(value[0])] if name == "count" else value.tolist()


def _entry_table(entry: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    return pa.table({key: pa.array([value]) for key, value in entry.items()})


def _statistics_of(row: Mapping[str, Any]) -> dict[str, Statistics]:
    """The statistics in an entry of ``meta/episodes``."""
    found: dict[str, Statistics] = {}
    for column, value in row.items():
        if column.startswith("stats/"):
            key, _, name = column.removeprefix("stats/").rpartition("/")
            if name in NAMES:
                found.setdefault(key, {})[name] = np.asarray(value, np.float64)
    return found
