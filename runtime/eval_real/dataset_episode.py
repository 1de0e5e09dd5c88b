"""The frames of a dataset from the recording of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import PolicyContract
from robots.base import RobotContract
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
    UNKNOWN,
    DatasetFeatures,
)
from runtime.eval_real.recording import Recording

Times = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Frames:
    """The policy ticks of one attempt.

    Attributes:
        rows: (n,) the row of the recording whose command holds at each tick.
        ticks_ns: (n,) when each tick is due.
        source: (n,) the frame of the observation that the command is based on, within the attempt.
    """

    rows: Times
    ticks_ns: Times
    source: Times


def dataset_features(
    robot: RobotContract,
    robot_type: str,
    contract: PolicyContract,
    *,
    lossless: bool,
) -> DatasetFeatures:
    """Return the features of a dataset recorded on ``robot`` with a policy of ``contract``."""
    return DatasetFeatures(
        fps=1 / contract.dt_s,
        robot_type=robot_type,
        state_names=robot.joint_names,
        action_names=robot.action_names,
        cameras={name: robot.cameras[name] for name in contract.camera_names},
        lossless=lossless,
    )


def frames_of(
    recording: Recording, pictures_ns: Mapping[str, Times]
) -> tuple[dict[str, NDArray[np.generic]], dict[str, Times]]:
    """Return the columns of a rollout's frames, one per policy tick, and the pictures they show.

    A frame has the command that was sent at its tick and the state read just before. If the control
    loop missed the tick, it has those of the tick before, which the robot kept. Its pictures are
    the newest that had arrived. After a fault and a resumption the frames go on.

    Args:
        recording: With at least one tick played; ``facts`` has ``success`` and ``reward``.
        pictures_ns: When each picture of each camera was received.

    Raises:
        ValueError: A camera has no picture.
    """
    if empty := [name for name, times in pictures_ns.items() if not len(times)]:
        raise ValueError(f"cameras {empty}: got no pictures, expected at least one of each")
    rows = recording.rows
    played = (rows["played"] != 0) & (rows["deadline_ns"] > 0)
    attempts = [
        _frames_of_attempt(recording, np.flatnonzero(played & (rows["attempt"] == attempt)))
        for attempt in np.unique(rows["attempt"][played])
    ]
    at = np.concatenate([attempt.rows for attempt in attempts])
    ticks_ns = np.concatenate([attempt.ticks_ns for attempt in attempts])
    starts = np.cumsum([0, *(len(attempt.rows) for attempt in attempts)])
    source = np.concatenate(
        [
            np.where(attempt.source >= 0, attempt.source + start, UNKNOWN)
            for attempt, start in zip(attempts, starts[:-1], strict=True)
        ]
    )
    sent_ns, captured_ns = rows["sent_ns"][at], rows["captured_ns"][at]
    now_ns = np.maximum(sent_ns, ticks_ns)
    last = np.arange(len(at)) == len(at) - 1
    columns: dict[str, NDArray[np.generic]] = {
        STATE: rows["state"][at],
        ACTION: rows["command"][at],
        REWARD: np.where(last, recording.facts["reward"], 0).astype(np.float32),
        DONE: last,
        SUCCESS: last & bool(recording.facts["success"]),
        TIME: (now_ns - now_ns[0]) / 1e9,
        LATENESS: (sent_ns - rows["deadline_ns"][at]) / 1e9,
        ACTION_AGE: np.where(captured_ns > 0, (sent_ns - captured_ns) / 1e9, UNKNOWN),
        SOURCE: source,
    }
    shown = {
        name: np.maximum(np.searchsorted(times, now_ns, side="right") - 1, 0)
        for name, times in pictures_ns.items()
    }
    return columns, shown


def _frames_of_attempt(recording: Recording, played: Times) -> _Frames:
    rows, config = recording.rows, recording.config
    deadlines_ns = rows["deadline_ns"][played]
    dt_ns, half_ns = config.contract.dt_s * 1e9, config.period_s * 5e8
    count = int((deadlines_ns[-1] - deadlines_ns[0] + half_ns) // dt_ns) + 1
    ticks_ns = deadlines_ns[0] + np.round(np.arange(count) * dt_ns).astype(np.int64)
    at = played[np.searchsorted(deadlines_ns, ticks_ns + half_ns, side="right") - 1]
    first_tick = rows["tick"][played[0]] // config.ratio
    return _Frames(at, ticks_ns, rows["source"][at] - first_tick)
