"""``eval_sim --dataset`` records the observations and the commands of its episodes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from policies.types import Policy
from runtime.datasets import dataset_recorder
from runtime.datasets.dataset_reader import DatasetReader
from runtime.datasets.dataset_recorder import DatasetRecorder
from runtime.datasets.features import ACTION
from runtime.eval_sim import cli as eval_sim
from tests.datasets import truth, two_camera_policy
from tests.runtime.command import status_of

POLICY = "python:tests.datasets.two_camera_policy:make"
TICKS = {"max_timesteps": "12"}


def evaluate(tmp_path: Path, *flags: str) -> int:
    short = [f"--env.{key}={value}" for key, value in TICKS.items()]
    argv = ["-m", POLICY, "-e", "fake", *short, "-o", str(tmp_path / "results"), "--videos", "0"]
    return status_of(eval_sim.main, [*argv, "--dataset", str(tmp_path / "set"), *flags])


def assert_recorded(root: Path, count: int, played: Policy | None = None) -> None:
    reader = DatasetReader(root)
    expected = truth.episodes("fake", TICKS, count, played)
    assert len(reader) == count
    for index in range(count):
        columns = reader.columns(index)
        same = [
            one
            for one in expected
            if np.array_equal(
                one["observation.images.top"], np.stack(list(reader.pictures(index, "top")))
            )
        ]
        assert len(same) == 1
        for key, column in same[0].items():
            if key.startswith("observation.images."):
                pictures = np.stack(list(reader.pictures(index, key.rpartition(".")[2])))
                np.testing.assert_array_equal(pictures, column)
            else:
                np.testing.assert_array_equal(columns[key], column)
        frames = np.arange(len(columns[ACTION]))
        np.testing.assert_array_equal(columns["metronome.time_s"], frames * 0.02)
        assert not columns["metronome.lateness_s"].any()
        assert columns["next.done"].tolist() == (frames == frames[-1]).tolist()


def test_episodes_are_recorded_bit_for_bit_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, "-n", "2", "--dataset_lossless") == 0
    assert f"dataset      {tmp_path / 'set'}/" in capsys.readouterr().out
    assert evaluate(tmp_path, "-n", "1", "-s", "2", "--dataset_lossless") == 0
    assert_recorded(tmp_path / "set", 3)
    info = json.loads((tmp_path / "set" / "meta" / "info.json").read_text())
    assert info["features"]["action"]["names"][:2] == ["joint_0", "joint_1"]
    assert info["features"]["observation.state"]["names"][:2] == ["state_0", "state_1"]
    assert info["robot_type"] == "fake"
    assert info["fps"] == 50


def test_a_frame_has_the_newest_of_two_ticks(tmp_path: Path) -> None:
    two = two_camera_policy.make_of_two_ticks()
    assert evaluate(tmp_path, "-n", "1", "--dataset_lossless", "-m", f"{POLICY}_of_two_ticks") == 0
    assert_recorded(tmp_path / "set", 1, two)
    one = truth.episodes("fake", TICKS, 1)[0]
    assert not np.array_equal(DatasetReader(tmp_path / "set").columns(0)[ACTION], one[ACTION])


@pytest.mark.long
def test_several_processes_record_into_one_dataset(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "-n", "6", "--num_envs", "3", "--dataset_lossless") == 0
    assert_recorded(tmp_path / "set", 6)
    assert not (tmp_path / "set" / ".recording").exists()


@pytest.mark.long
def test_real_time_records_when_commands_were_given(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "-n", "2", "--realtime") == 0
    reader = DatasetReader(tmp_path / "set")
    for index in range(2):
        columns = reader.columns(index)
        time_s, frames = columns["metronome.time_s"], np.arange(len(columns[ACTION]))
        assert time_s[0] == 0
        assert (np.diff(time_s) >= 0).all()
        np.testing.assert_allclose(
            columns["metronome.lateness_s"], time_s - frames * 0.02, atol=1e-12
        )
        assert (columns["metronome.action_age_s"] > 0).all()
        assert (columns["metronome.source_frame"] <= frames).all()


@pytest.mark.long
def test_the_objects_are_recorded_where_asked_for(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "-n", "1", "--dataset_objects") == 0
    reader = DatasetReader(tmp_path / "set")
    assert reader.columns(0)["observation.environment_state"].shape == (12, 2)


@pytest.mark.long
def test_another_dataset_is_refused_before_an_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, "-n", "1") == 0
    assert evaluate(tmp_path, "-n", "1", "--dataset_lossless") == eval_sim.BAD_INPUT
    assert "expected video [120, 160, 3]" in capsys.readouterr().err
    assert len(DatasetReader(tmp_path / "set")) == 1


@pytest.mark.long
def test_a_recorder_that_dies_ends_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was recorded before stays, and so does the result."""
    add = DatasetRecorder.add

    def add_and_kill(recorder: DatasetRecorder, folder: Path) -> None:
        add(recorder, folder)
        if folder.name.endswith("seed_1"):
            os.kill(recorder._process.pid, signal.SIGKILL)

    monkeypatch.setattr(DatasetRecorder, "add", add_and_kill)
    monkeypatch.setattr(dataset_recorder, "RECORDER_WITHIN_S", 0.2)
    assert evaluate(tmp_path, "-n", "5") == eval_sim.LOST
    assert "recorder" in capsys.readouterr().err
    assert 1 <= len(DatasetReader(tmp_path / "set")) <= 2
    monkeypatch.undo()
    assert evaluate(tmp_path, "-n", "1") == 0
    assert 2 <= len(DatasetReader(tmp_path / "set")) <= 3
