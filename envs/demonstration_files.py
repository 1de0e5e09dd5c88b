"""Stores episodes of the expert: as ACT's HDF5 files, or in a LeRobotDataset.

Processes that simulate write an episode each (``write_hdf5``, ``write_spool``). The process that
started them gives the finished ones their place (``Hdf5Folder``, ``DatasetFolder``).
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import ACTION_DIM, DT_S, STATE_DIM
from envs.aloha_tasks import MAX_REWARD, find_task
from envs.errors import EnvError
from runtime.datasets import layout
from runtime.datasets.dataset_writer import DatasetWriter
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import (
    ACTION,
    ACTION_AGE,
    DONE,
    ENVIRONMENT,
    LATENESS,
    REWARD,
    SOURCE,
    STATE,
    SUCCESS,
    TIME,
    UNKNOWN,
    DatasetFeatures,
    names_or_numbers,
)
from runtime.datasets.spooled_episode import PictureSpool, SpooledEpisode, write_columns

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class EpisodeRows:
    """What was seen at T ticks, and commanded after each.

    Attributes:
        qpos, qvel, actions: (T, 14).
        object_qpos: (T, 7 * objects).
        rewards: (T + 1,): before every action, and after the last.
        pictures: Camera to (T, H, W, 3) uint8.
    """

    qpos: Floats
    qvel: Floats
    actions: Floats
    object_qpos: Floats
    rewards: Floats
    pictures: Mapping[str, NDArray[np.uint8]]


def write_hdf5(path: Path, rows: EpisodeRows, attributes: Mapping[str, Any]) -> None:
    """Write an episode in ACT's layout. The file gets its name only when it is complete."""
    import h5py

    partial = path.with_suffix(".partial")
    with h5py.File(partial, "w") as file:
        file.attrs.update(attributes)
        file["observations/qpos"], file["observations/qvel"] = rows.qpos, rows.qvel
        file["action"] = rows.actions
        for camera, frames in rows.pictures.items():
            file.create_dataset(
                f"observations/images/{camera}",
                data=frames,
                chunks=(1, *frames.shape[1:]),
                compression="lzf",
            )
        file["metronome/object_qpos"] = rows.object_qpos
        file["metronome/reward"] = rows.rewards[:-1]
    partial.rename(path)


def write_spool(root: Path, name: str, rows: EpisodeRows, task: str) -> Path:
    """Leave an episode for the ``DatasetFolder`` at ``root``; return its place. Raises ``OSError``.

    No observation is behind a command: the expert planned it before the episode.
    """
    folder = layout.spool_folder(root, name)
    cameras = {camera: frames.shape[1:3] for camera, frames in rows.pictures.items()}
    spool = PictureSpool(folder, cameras)
    try:
        for camera, frames in rows.pictures.items():
            for picture in frames:
                spool.add(camera, picture)
    finally:
        spool.close()
    ticks = np.arange(len(rows.actions))
    columns = {
        STATE: rows.qpos,
        ACTION: rows.actions,
        ENVIRONMENT: rows.object_qpos,
        REWARD: rows.rewards[1:],
        DONE: ticks == ticks[-1],
        SUCCESS: rows.rewards[1:] == MAX_REWARD,
        TIME: ticks * DT_S,
        LATENESS: np.zeros(len(ticks)),
        ACTION_AGE: np.full(len(ticks), UNKNOWN, np.float64),
        SOURCE: np.full(len(ticks), UNKNOWN),
    }
    write_columns(folder, columns, dict.fromkeys(cameras, ticks), task)
    return folder


class Hdf5Folder:
    """The files ``episode_0.hdf5``, ``episode_1.hdf5``, … of a new folder.

    Raises:
        EnvError: The folder has episodes.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._kept = root, 0
        if any(root.glob("*.hdf5")):
            raise EnvError(f"{root}: got a folder with episodes, expected a new one")

    def keep(self, written: Path) -> Path:
        """Give a written episode the next number; return its path."""
        path = self._root / f"episode_{self._kept}.hdf5"
        written.rename(path)
        self._kept += 1
        return path

    def __enter__(self) -> Hdf5Folder:
        return self

    def __exit__(self, *_: object) -> None:
        """Every file has its place already."""


class DatasetFolder:
    """A new LeRobotDataset v3.

    Args:
        root: Its folder.
        task: The simulation's task.
        cameras: Camera to (height, width).
        lossless: Whether pictures are stored as PNG, bit for bit, and not as video.

    Raises:
        EnvError: The folder has something in it, or cannot be written; a package is missing.
    """

    def __init__(
        self, root: Path, *, task: str, cameras: Mapping[str, tuple[int, int]], lossless: bool
    ) -> None:
        self._root = root
        features = DatasetFeatures(
            fps=1 / DT_S,
            robot_type="aloha",
            state_names=names_or_numbers((), "state", STATE_DIM),
            action_names=names_or_numbers((), "action", ACTION_DIM),
            cameras=cameras,
            environment_names=find_task(task).object_pose_names,
            lossless=lossless,
        )
        if (root / layout.INFO).exists():
            raise EnvError(f"{root}: got a folder with episodes, expected a new one")
        try:
            for package in ("av", "pyarrow"):
                importlib.import_module(package)  # not only when the first episode is finished
            self._writer = DatasetWriter(root, features)
        except ImportError as error:
            raise EnvError(f"{error}; pip install '.[dataset]' brings it") from error
        except (DatasetError, OSError) as error:
            raise EnvError(str(error)) from error

    def keep(self, written: Path) -> Path:
        """Add a written episode to the dataset; return the dataset's folder.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        self._writer.take(SpooledEpisode.load(written))
        return self._root

    def __enter__(self) -> DatasetFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the episodes that were not kept."""
        self._writer.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(self._root / layout.WORK_FOLDER)
