"""The record of one episode."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.control.chunk_executor import ExecutorStatistics


@dataclass(frozen=True, slots=True)
class Episode:
    """The outcome and the measurements of one episode.

    Attributes:
        seed: The seed of the world's reset.
        success: Whether the task was achieved.
        reward: Highest reward of any tick.
        horizon: Ticks until success or the end.
        missed_ticks: Ticks that the loop skipped; 0 in lockstep.
        executor: Counts of the chunk executor.
        action_age_s: (n,) per tick, the age of the observation that the command is based on. In
            simulated time in lockstep, by the monotonic clock in real time.
        lateness_s: (n,) per tick, how far after its deadline the step returned; empty in lockstep.
        stages_ns: Duration of each stage in every request, by stage.
        wall_s: Wall-clock duration.
        answer_delay_s: (n,) per chunk, from its observation's capture until it could be used. By
            the same clock as ``action_age_s``; 0 in lockstep without the latency dial. Empty on a
            robot.
        drawn_latency_s: (n,) what the latency dial drew, one per observation that was not lost.
        lost_observations: How many observations the latency dial lost.
        command_jerk: Root mean square of the third derivative of the commanded path over ticks and
            joints, in the commands' unit per s³. None on a robot, or with fewer than 4 commands.
    """

    seed: int
    success: bool
    reward: float
    horizon: int
    missed_ticks: int
    executor: ExecutorStatistics
    action_age_s: NDArray[np.float64]
    lateness_s: NDArray[np.float64]
    stages_ns: dict[str, list[int]]
    wall_s: float
    answer_delay_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    drawn_latency_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    lost_observations: int = 0
    command_jerk: float | None = None


@dataclass(frozen=True, slots=True)
class ErroredEpisode:
    """An episode without an outcome: each time that it was run, its worker died or hung.

    It is neither a success nor a failure of the policy.

    Attributes:
        seed: The seed of the world's reset.
        error: How the last worker was lost.
        attempts: How often it was run.
    """

    seed: int
    error: str
    attempts: int
