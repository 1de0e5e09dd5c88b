"""Where LeRobot's format v3.0 keeps what, and its tables that are not the data itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.datasets.errors import DatasetError

VERSION = "v3.0"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES_FOLDER = "meta/episodes"
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"{EPISODES_FOLDER}/{_FILE}.parquet"
DATA_PATH = f"data/{_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{_FILE}.mp4"
CHUNK_FILES = 1000
"""Files in a folder ``chunk-…``."""
DATA_MB, VIDEO_MB = 100, 200
"""Largest files that LeRobot itself writes; each of ours has one episode."""
TASK_INDEX, TASK_NAME = "task_index", "__index_level_0__"
CONVERT = (
    "convert it with LeRobot: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 "
    "--repo-id=ORG/NAME --root=DIR --push-to-hub=false"
)
WORK_FOLDER = ".recording"
"""For unfinished files; LeRobot does not look into it."""


def read_info(root: Path) -> dict[str, Any]:
    """Return ``meta/info.json``.

    Raises:
        DatasetError: There is none, it is not JSON, or it is of another version.
    """
    path = root / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["codebase_version"]
    except FileNotFoundError as error:
        what = f"got no {INFO}" if root.is_dir() else "no such folder"
        raise DatasetError(f"{root}: {what}, expected a LeRobotDataset") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: cannot be read: {error!r}") from error
    if version != VERSION:
        hint = f"; {CONVERT}" if version == "v2.1" else ""
        raise DatasetError(f"{path}: codebase_version: got {version!r}, expected {VERSION!r}{hint}")
    return dict(info)


def read_episodes(root: Path, total: int) -> list[dict[str, Any]]:
    """Return the first ``total`` rows of ``meta/episodes``, by column.

    Raises:
        DatasetError: A row is missing.
        OSError, pyarrow.ArrowException: A file cannot be read.
    """
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    for path in sorted((root / EPISODES_FOLDER).glob("*/*.parquet")):
        rows += parquet.read_table(path).to_pylist()
    rows = sorted(rows, key=lambda row: int(row["episode_index"]))[:total]
    if [row["episode_index"] for row in rows] != list(range(total)):
        raise DatasetError(f"{root}: got {len(rows)} episodes in meta/episodes, expected {total}")
    return rows


def read_last_episode(root: Path, total: int) -> dict[str, Any]:
    """Return row ``total`` - 1 of ``meta/episodes``, by column, without reading all of them.

    Raises:
        DatasetError: There is no such row.
        OSError, pyarrow.ArrowException: A file cannot be read.
    """
    from pyarrow import parquet

    for path in sorted((root / EPISODES_FOLDER).glob("*/*.parquet"), reverse=True):
        for row in reversed(parquet.read_table(path).to_pylist()):
            if row["episode_index"] == total - 1:
                return dict(row)
    raise DatasetError(f"{root}: got no episode {total - 1} in meta/episodes, expected {total}")


def read_tasks(root: Path) -> list[str]:
    """Return the instructions, by ``task_index``. Raises ``OSError``, ``DatasetError``."""
    from pyarrow import parquet

    table = parquet.read_table(root / TASKS)
    names = [name for name in table.column_names if name != TASK_INDEX]
    if TASK_INDEX not in table.column_names or len(names) != 1:
        raise DatasetError(
            f"{root / TASKS}: got the columns {table.column_names}, expected {TASK_INDEX} and the "
            "tasks"
        )
    found = dict(zip(*(table[name].to_pylist() for name in (TASK_INDEX, *names)), strict=True))
    return [found[index] for index in sorted(found)]


def tasks_table(tasks: Sequence[str]) -> Any:
    """Return the pyarrow table of ``meta/tasks.parquet``.

    LeRobot reads it as a pandas table whose index are the tasks; the schema says so.
    """
    import pyarrow as pa

    index = {"name": None, "field_name": TASK_NAME, "pandas_type": "unicode"}
    column = {"name": TASK_INDEX, "field_name": TASK_INDEX, "pandas_type": "int64"}
    pandas = {
        "index_columns": [TASK_NAME],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [
            column | {"numpy_type": "int64", "metadata": None},
            index | {"numpy_type": "object", "metadata": None},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({TASK_INDEX: pa.array(range(len(tasks)), pa.int64()), TASK_NAME: list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def spool_folder(root: Path, name: str) -> Path:
    """Return where this process leaves the episode ``name`` for the recorder."""
    return root / WORK_FOLDER / f"{os.getpid()}-{name}"


def remove_abandoned_spools(root: Path) -> None:
    """Remove the episodes that dead processes left, half written or not recorded."""
    for folder in (root / WORK_FOLDER).glob("*-*"):
        pid = folder.name.partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def next_file(place: tuple[int, int]) -> tuple[int, int]:
    """Return the (chunk, file) indices after ``place``."""
    chunk, file = place
    return (chunk + 1, 0) if file + 1 >= CHUNK_FILES else (chunk, file + 1)


def data_path(info: Mapping[str, Any], episode: Mapping[str, Any]) -> str:
    """Return the path of an episode's rows below the dataset's folder."""
    return str(
        info["data_path"].format(
            chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"]
        )
    )


def video_path(info: Mapping[str, Any], episode: Mapping[str, Any], key: str) -> str:
    """Return the path of an episode's video in column ``key`` below the dataset's folder."""
    return str(
        info["video_path"].format(
            video_key=key,
            chunk_index=episode[f"videos/{key}/chunk_index"],
            file_index=episode[f"videos/{key}/file_index"],
        )
    )
