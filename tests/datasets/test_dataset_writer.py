"""``DatasetWriter``: what it writes is read back, also after it was killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runtime.datasets import dataset_writer
from runtime.datasets.dataset_reader import DatasetReader
from runtime.datasets.dataset_writer import DatasetWriter
from runtime.datasets.errors import DatasetError
from tests.datasets.episodes import add, assert_holds, episode, features


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is cleaned up."""


@pytest.mark.parametrize("lossless", [False, True])
def test_what_is_written_is_read_back(tmp_path: Path, lossless: bool) -> None:
    made = features(lossless=lossless)
    root = tmp_path / "new" / "dataset"
    with DatasetWriter(root, made) as writer:
        assert [add(writer, made, seed) for seed in range(3)] == [0, 1, 2]
    assert_holds(root, made, 3)
    assert {path.name for path in root.iterdir()} == {"data", "meta"} | (
        set() if lossless else {"videos"}
    )


def test_one_number_per_frame_is_a_plain_column(tmp_path: Path) -> None:
    made = features(state_names=("only",), cameras={})
    columns, _ = episode(made, 0)
    with DatasetWriter(tmp_path, made) as writer:
        writer.add(columns, {}, "push")
    np.testing.assert_array_equal(
        DatasetReader(tmp_path).columns(0)["observation.state"], columns["observation.state"][:, 0]
    )


def test_a_dataset_is_continued(tmp_path: Path) -> None:
    made = features(lossless=True)
    for first in (0, 2):
        with DatasetWriter(tmp_path, made) as writer:
            assert writer.episodes == first
            for seed in (first, first + 1):
                add(writer, made, seed, task=f"task {seed % 3}")
    assert_holds(tmp_path, made, 4)
    reader = DatasetReader(tmp_path)
    assert reader.tasks == ["task 0", "task 1", "task 2"]
    assert [reader.columns(index)["task_index"][0] for index in range(4)] == [0, 1, 2, 0]


def test_statistics_are_those_of_all_frames(tmp_path: Path) -> None:
    made = features(lossless=True)
    for seeds in ((0, 1), (2,)):
        with DatasetWriter(tmp_path, made) as writer:
            for seed in seeds:
                add(writer, made, seed)
    written = json.loads((tmp_path / "meta" / "stats.json").read_text())
    states = np.concatenate([episode(made, seed)[0]["observation.state"] for seed in range(3)])
    state = written["observation.state"]
    np.testing.assert_allclose(state["mean"], states.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(state["std"], states.std(0, dtype=np.float64), rtol=1e-12)
    assert state["min"] == states.min(0).tolist()
    assert state["max"] == states.max(0).tolist()
    assert state["count"] == [len(states)]
    tops = np.concatenate([episode(made, seed)[1]["top"][:, ::4, ::4] for seed in range(3)]) / 255
    top = written["observation.images.top"]
    np.testing.assert_allclose(np.ravel(top["mean"]), tops.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(top["std"]), tops.std((0, 1, 2)), rtol=1e-12)
    assert np.shape(top["q50"]) == (3, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 30.0}, r"fps: got 30, expected 50, the dataset's own"),
        ({"cameras": {"top": (16, 24)}}, r"wrist_left: got no such column, expected video"),
        ({"action_names": ("x", "y", "w")}, r"action: got float32 \[3\] \['x', 'y', 'w'\]"),
        ({"robot_type": "other"}, r"robot_type: got 'other', expected 'toy'"),
        ({"lossless": True}, r"got image \[16, 24, 3\]"),
    ],
)
def test_another_dataset_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with DatasetWriter(tmp_path, features()) as writer:
        add(writer, features(), 0)
    with pytest.raises(DatasetError, match=message):
        DatasetWriter(tmp_path, features(**changes))
    with DatasetWriter(tmp_path, features()) as writer:  # the refused one holds no lock
        assert writer.episodes == 1


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DatasetError, match=r"got a folder with \['thesis.tex'\], expected a new"):
        DatasetWriter(tmp_path, features())


def test_two_writers_at_a_time_are_refused(tmp_path: Path) -> None:
    with (
        DatasetWriter(tmp_path, features()),
        pytest.raises(DatasetError, match=r"another process writes to this dataset"),
    ):
        DatasetWriter(tmp_path, features())


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = features(cameras={})
    columns, _ = episode(made, 0)
    with DatasetWriter(tmp_path, made) as writer:
        with pytest.raises(DatasetError, match=r"action: got the shape \(4, 2\), expected \(4, 3"):
            writer.add(columns | {"action": columns["action"][:, :2]}, {}, "push")
        with pytest.raises(DatasetError, match=r"got the columns"):
            writer.add({"action": columns["action"]}, {}, "push")


def test_cameras_with_the_same_column_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"expected different ones"):
        features(cameras={"a/b": (4, 4), "a_b": (4, 4)})


@pytest.mark.parametrize("steps", range(7))
def test_killed_at_any_step_of_an_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """An episode's files are renamed in six steps. The next writer goes on after the episodes."""
    made = features(lossless=False, cameras={"top": (16, 24)})
    writer = DatasetWriter(tmp_path, made)
    add(writer, made, 0)
    left = [steps]
    move = dataset_writer._move

    def dying_move(source: Path, target: Path) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        move(source, target)

    monkeypatch.setattr(dataset_writer, "_move", dying_move)
    finished = 1
    try:
        add(writer, made, 1, task="another")
        finished = 2
    except Killed:
        pass
    assert (finished == 2) == (steps >= 6)
    assert_holds(tmp_path, made, finished)
    monkeypatch.setattr(dataset_writer, "_move", move)
    dataset_writer.os.close(writer._lock)  # as the kernel does
    with DatasetWriter(tmp_path, made) as after:
        assert len(list(tmp_path.glob("data/*/*.parquet"))) == finished
        assert len(list(tmp_path.glob("meta/episodes/*/*.parquet"))) == finished
        add(after, made, finished)
    assert_holds(tmp_path, made, finished + 1)
    frames = DatasetReader(tmp_path).info["total_frames"]
    written = json.loads((tmp_path / "meta" / "stats.json").read_text())
    assert {one["count"][0] for key, one in written.items()} == {frames}
    assert not (tmp_path / ".recording").exists()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    made = features(lossless=True)
    with DatasetWriter(tmp_path, made) as writer:
        add(writer, made, 0)
    file = tmp_path / "data" / "chunk-000" / "file-000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"file-000.parquet: cannot be read"):
        DatasetReader(tmp_path).columns(0)
    (tmp_path / "meta" / "info.json").write_text('{"codebase_version": "v2.1"}')
    with pytest.raises(DatasetError, match=r"codebase_version: got 'v2.1', expected 'v3.0'"):
        DatasetReader(tmp_path)
