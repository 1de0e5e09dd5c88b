"""The record of one episode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.control.chunk_executor import ExecutorStatistics


@dataclass(frozen=True, slots=True)
class Episode:
    """What happened.

    Attributes:
        seed: The world's.
        success: Whether the task was achieved.
        reward: Highest reward of any tick.
        horizon: Ticks until success or the end.
        missed_ticks: Ticks that the loop had to skip; 0 in lockstep.
        executor: Counts of the chunk executor.
        action_age_s: (n,) per tick: time since the capture behind the command. In lockstep in the
            world's time, in real time by the monotonic clock.
        lateness_s: (n,) per tick; empty in lockstep.
        stages_ns: Raw durations of every request by stage.
        wall_s: Seconds it took.
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
