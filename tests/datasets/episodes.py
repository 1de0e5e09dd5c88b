"""Small episodes for the tests of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.datasets.dataset_reader import DatasetReader
from runtime.datasets.dataset_writer import DatasetWriter
from runtime.datasets.features import (
    ACTION,
    ACTION_AGE,
    DONE,
    LATENESS,
    REWARD,
    SOURCE,
    STATE,
    SUCCESS,
    TIME,
    DatasetFeatures,
)

TWO_CAMERAS = {"top": (16, 24), "wrist/left": (15, 24)}


def features(**changes: Any) -> DatasetFeatures:
    given: dict[str, Any] = {
        "fps": 50.0,
        "robot_type": "toy",
        "state_names": ("a", "b"),
        "action_names": ("x", "y", "z"),
        "cameras": TWO_CAMERAS,
    }
    return DatasetFeatures(**given | changes)


def episode(made: DatasetFeatures, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Columns and pictures of 4 to 7 frames."""
    rng = np.random.default_rng(seed)
    n = 4 + seed % 4
    columns = {
        STATE: rng.normal(size=(n, len(made.state_names))).astype(np.float32),
        ACTION: rng.normal(size=(n, len(made.action_names))).astype(np.float32),
        REWARD: rng.uniform(size=n).astype(np.float32),
        DONE: np.arange(n) == n - 1,
        SUCCESS: np.arange(n) == n - 1,
        TIME: np.arange(n) / made.fps + rng.uniform(0, 0.001, n),
        LATENESS: rng.uniform(0, 0.001, n),
        ACTION_AGE: rng.uniform(0, 0.1, n),
        SOURCE: np.arange(n) // 2,
    }
    y, x = np.mgrid[:40, :40]
    pictures = {
        name: np.stack(
            [np.stack([x * 5, y * 5, 3 * x + 2 * y + 9 * k], -1) % 256 for k in range(n)]
        ).astype(np.uint8)[:, : hw[0], : hw[1]]
        for name, hw in made.cameras.items()
    }
    return columns, pictures


def add(writer: DatasetWriter, made: DatasetFeatures, seed: int, task: str = "push") -> int:
    columns, pictures = episode(made, seed)
    through = {name: (lambda all_of=all_of: iter(all_of)) for name, all_of in pictures.items()}
    return writer.add(columns, through, task)


def assert_holds(root: Path, made: DatasetFeatures, count: int) -> None:
    """The dataset has the episodes of seeds 0 to ``count`` - 1, in their order."""
    reader = DatasetReader(root)
    assert len(reader) == count
    start = 0
    for index in range(count):
        columns, pictures = episode(made, index)
        read = reader.columns(index)
        for key, column in columns.items():
            np.testing.assert_array_equal(read[key], column, strict=True)
        n = len(columns[ACTION])
        np.testing.assert_array_equal(read["index"], np.arange(start, start + n))
        np.testing.assert_array_equal(read["frame_index"], np.arange(n))
        assert (read["episode_index"] == index).all()
        np.testing.assert_array_equal(
            read["timestamp"], (np.arange(n) / made.fps).astype(np.float32)
        )
        for name, expected in pictures.items():
            got = np.stack(list(reader.pictures(index, name.replace("/", "_"))))
            if made.lossless:
                np.testing.assert_array_equal(got, expected)
            else:
                assert psnr(got, expected) >= 35
        start += n
    assert reader.info["total_frames"] == start


def psnr(got: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB."""
    error = np.mean((got.astype(np.float64) - expected) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
