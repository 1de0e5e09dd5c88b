"""From a recording of ``eval_real`` to the frames of a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from policies.types import CameraContract, PolicyContract
from robots.base import arm_actions
from robots.joint_limits import JointLimits
from runtime.eval_real.dataset_episode import frames_of
from runtime.eval_real.recording import Recording
from runtime.eval_real.run_config import RobotLimits, RunConfig

CONTRACT = PolicyContract("toy", (CameraContract("top", (4, 4), (4, 4)),), 2, 2, 20, 10, dt_s=0.02)
CONFIG = RunConfig(
    robot="toy", contract_json=CONTRACT.to_json(), address="127.0.0.1:1", publish_rate=100.0
)
LIMITS = RobotLimits(
    JointLimits(*(np.ones(2) * n for n in (-9, 9, 9, 9))), None, np.ones(2), arm_actions("ab", ())
)
MS = 1_000_000
START_NS = 5_000 * MS


def recording(*attempts: tuple[int, list[int]]) -> Recording:
    """Attempts: when each begins, and its control ticks, 10 ms apart, that were not missed.

    Two rows before and after each were not played. A command is its row's number.
    """
    rows: list[dict[str, Any]] = []
    for attempt, (begins_ms, ticks) in enumerate(attempts, 1):
        last = ticks[-1]
        for tick in (-2, -1, *ticks, last + 1, last + 2):
            deadline_ns = START_NS + (begins_ms + 10 * tick) * MS
            played = tick in ticks
            rows.append(
                {
                    "row": len(rows), "attempt": attempt, "tick": tick, "played": played,
                    "deadline_ns": deadline_ns, "sent_ns": deadline_ns + MS,
                    "captured_ns": deadline_ns - 30 * MS if tick else 0,
                    "source": 2 * (tick // 4) if tick else -1,
                }
            )  # fmt: skip
    columns = {name: np.array([row[name] for row in rows], np.int64) for name in rows[0]}
    numbers = np.repeat(np.arange(len(rows), dtype=np.float32)[:, None], 2, axis=1)
    columns |= {"command": numbers, "state": numbers + 0.5}
    facts = {"success": True, "reward": 4.0}
    return Recording(columns, {}, CONFIG, LIMITS, facts)


def test_a_frame_has_the_command_the_state_and_the_picture_of_its_tick() -> None:
    made = recording((0, list(range(12))))
    received_ns = START_NS + np.array([-40, -1, 30, 62, 100]) * MS
    columns, shown = frames_of(made, {"top": received_ns})
    # The policy plays every other tick of the arm, whose first one is row 2.
    assert columns["action"][:, 0].tolist() == [2, 4, 6, 8, 10, 12]
    np.testing.assert_array_equal(columns["observation.state"], columns["action"] + 0.5)
    # Sent at 1, 21, 41, 61, 81 and 101 ms.
    assert shown["top"].tolist() == [1, 1, 2, 2, 3, 4]
    assert columns["next.done"].tolist() == columns["next.success"].tolist() == [False] * 5 + [True]
    assert columns["next.reward"].tolist() == [0, 0, 0, 0, 0, 4]
    np.testing.assert_allclose(columns["metronome.time_s"], np.arange(6) * 0.02)
    np.testing.assert_allclose(columns["metronome.lateness_s"], 0.001)
    np.testing.assert_allclose(columns["metronome.action_age_s"], [-1] + [0.031] * 5)
    assert columns["metronome.source_frame"].tolist() == [-1, 0, 2, 2, 4, 4]


def test_a_missed_tick_is_a_frame_with_the_command_before() -> None:
    made = recording((0, [0, 1, 2, 3, 7, 8, 9]))
    columns, _ = frames_of(made, {})
    assert columns["action"][:, 0].tolist() == [2, 4, 5, 5, 7]
    np.testing.assert_allclose(columns["metronome.time_s"], [0, 0.02, 0.039, 0.059, 0.08])


def test_after_a_resumption_the_frames_go_on() -> None:
    columns, _ = frames_of(recording((0, [0, 1, 2, 3]), (3000, [0, 1, 2, 3, 4])), {})
    assert columns["action"][:, 0].tolist() == [2, 4, 10, 12, 14]
    np.testing.assert_allclose(columns["metronome.time_s"], [0, 0.02, 3, 3.02, 3.04])
    assert columns["metronome.source_frame"].tolist() == [-1, 0, -1, 2, 4]


def test_a_camera_without_a_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['top'\]: got no pictures, expected at least one"):
        frames_of(recording((0, [0, 1])), {"top": np.empty(0, np.int64)})
