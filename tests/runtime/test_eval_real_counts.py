"""Counts in a result are those of the rollout itself, not of a replay of its recording."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.types import ActionChunk
from robots.factory import make_robot
from robots.motion_limiter import MotionLimiter
from runtime.eval_real.recording import Recording
from runtime.eval_real.replay import main, replay
from runtime.eval_real.rollout_counts import COUNTED, RolloutCounter, RolloutCounts, last_counts
from runtime.eval_real.run_config import RobotLimits, RunConfig
from tests.faults.sine_policy import CONTRACT, Stalling

ROOT = Path(__file__).resolve().parents[2]
AS_IT_IS = """
from runtime.eval_real.cli import main
"""
ANOTHER_REPLAY = """
import dataclasses
from runtime.eval_real import rollout_session
from runtime.eval_real.cli import main

replay = rollout_session.replay

def replay_on_a_quicker_robot(recording):
    limits = recording.robot_limits.limits
    limits = dataclasses.replace(limits, acceleration=2 * limits.acceleration)
    return replay(dataclasses.replace(
        recording,
        robot_limits=dataclasses.replace(recording.robot_limits, limits=limits)))

rollout_session.replay = replay_on_a_quicker_robot
"""


def evaluate(program: str, folder: Path) -> tuple[dict[str, Any], Recording]:
    """The result and the recording of one rollout with a policy that stalls, on the dummy robot."""
    flags = [
        *("-m", "python:tests.faults.sine_policy:make_stalling", "-c", "dummy", "--task", "fake"),
        *("--robot.obs_config.image.top.shape", "(48, 64, 3)", "--near", "9", "--yes"),
        *("--fault_after_s", "9", "--max_chunk_age_s", "9", "--max_timesteps", "200", "-n", "1"),
        *("--video_fps", "0", "-o", str(folder)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nraise SystemExit(main({flags}))"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "dummy" / "fake.json").read_text())
    return result, Recording.load(folder / "dummy" / "fake" / "rollout_000")


def counts_from_commands(recording: Recording) -> dict[str, int]:
    """The counts, computed from the commands and the chunks alone."""
    rows, chunks = recording.rows, recording.chunks
    played = rows["played"].astype(bool)
    ticks, at = rows["tick"][played], rows["row"][played]
    first = chunks["obs_timestep"] + chunks["first_action_offset"]
    end = first + chunks["count"]
    assert (np.diff(chunks["obs_timestep"]) > 0).all()  # none was dropped
    covered = (first <= ticks[:, None]) & (ticks[:, None] < end)
    here = chunks["row"] <= at[:, None]
    limiter = MotionLimiter(recording.robot_limits.limits, recording.config.period_s)
    limiter.reset(rows["pose"][0])
    for command in rows["command"][played]:
        asked = np.full(len(command), Stalling.PLACE)
        np.testing.assert_array_equal(limiter.limit(asked), command)
    emitted = np.array([ticks[at < row].max(initial=-1) + 1 for row in chunks["row"]])
    return {
        "chunks": len(first),
        "starved_ticks": int((~(covered & here).any(axis=1)).sum()),
        "discarded_actions": int(np.maximum(np.minimum(end, emitted) - first, 0).sum()),
        "clamped_ticks": limiter.clamped_ticks,
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("program", "identical"), [(AS_IT_IS, True), (ANOTHER_REPLAY, False)], ids=["same", "another"]
)
def test_result_counts_are_those_of_the_rollout_when_the_replay_differs(
    program: str, identical: bool, tmp_path: Path
) -> None:
    result, recording = evaluate(program, tmp_path)
    (episode,) = result["episodes"]
    shown = counts_from_commands(recording)
    assert episode["replays_bit_for_bit"] is identical
    assert shown["starved_ticks"] > 10
    assert shown["clamped_ticks"] > 5
    assert shown["discarded_actions"] > 10
    assert episode["clamped_ticks"] == result["clamped_ticks"] == shown["clamped_ticks"]
    assert episode["starved_ticks"] == shown["starved_ticks"]
    timing = result["timing"]
    for name in ("chunks", "starved_ticks", "discarded_actions"):
        assert timing[name] == shown[name]


@pytest.mark.long
def test_a_recording_without_counts_replays(tmp_path: Path) -> None:
    _, recording = evaluate(AS_IT_IS, tmp_path)
    stem = tmp_path / "dummy" / "fake" / "rollout_000"
    with np.load(stem.with_suffix(".npz")) as arrays:
        older = {name: array for name, array in arrays.items() if name not in COUNTED}
    assert len(older) == len(arrays.files) - len(COUNTED)
    np.savez(stem.with_suffix(".npz"), **older)
    assert main([str(stem)]) == 0
    assert replay(recording).first_difference(Recording.load(stem)) is None


def row() -> dict[str, np.ndarray]:
    return {name: np.zeros((), float if name == "seam_jump" else int) for name in COUNTED}


def counted(counter: RolloutCounter) -> RolloutCounts:
    into: Mapping[str, np.ndarray] = row()
    counter.write(into)
    return last_counts({name: np.array([0, value]) for name, value in into.items()})


def test_counts_continue_across_resets_and_in_a_successor() -> None:
    config = RunConfig(
        robot="dummy", contract_json=CONTRACT.to_json(), address="127.0.0.1:1", near=9.0
    )
    machine = config.make_state_machine(RobotLimits.of(make_robot("dummy", {})))
    counter = RolloutCounter(machine.stream, RolloutCounts.read(row()))

    def play(ticks: int) -> None:
        machine.accept(ActionChunk(np.full((5, 14), 1.0, np.float32), machine.tick))
        for _ in range(ticks):
            machine.command()

    machine.reset(np.zeros(14))
    machine.start()
    counter.begin()
    play(8)
    once = counted(counter)
    assert once.executor.chunks == 1
    assert once.executor.starved_ticks == 3
    assert once.clamped_ticks > 0
    # A fault that is released resets the state machine, but not the counts of the rollout.
    with counter.across_reset():
        machine.reset(machine.stream.last_command.copy())
    assert counted(counter) == once
    with counter.across_reset():
        machine.resume()
    play(8)
    twice = counted(counter)
    assert twice.executor.chunks == 2
    assert twice.executor.starved_ticks == 6
    # A successor has the last row.
    last = row()
    counter.write(last)
    successor = config.make_state_machine(RobotLimits.of(make_robot("dummy", {})))
    assert counted(RolloutCounter(successor.stream, RolloutCounts.read(last))) == twice
    # A fault that is resumed resets nothing, and is not counted twice.
    machine.fail("a test")
    while machine.phase.name != "FAULT":
        machine.command()
    before = counted(counter)
    with counter.across_reset():
        machine.resume()
    assert counted(counter) == before
    counter.begin()
    machine.reset(np.zeros(14))
    assert counted(counter) == RolloutCounts.read(row())
