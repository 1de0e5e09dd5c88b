"""How others pace a loop, written from what they say they do; and each judged by its own deadline.

None of them has a grid of deadlines: each period starts when the one before is found to be over, so
what a wake-up is late is added to every deadline after it. Lateness against those sliding deadlines
is the kinder figure, and the one that is compared; what adds up is shown as drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Step = Callable[[int], None]
Samples = NDArray[np.float64]


def ilstudio(step: Step, ticks: int, period_s: float, lateness_s: Samples) -> None:
    """Sleep what is left of the period, then restart it."""
    period_began_s = deadline_s = time.perf_counter()
    for tick in range(ticks):
        step(tick)
        lateness_s[tick] = time.perf_counter() - deadline_s
        remaining_s = period_s - (time.perf_counter() - period_began_s)
        if remaining_s > 0:
            time.sleep(remaining_s)
        deadline_s = period_began_s + period_s
        period_began_s = time.perf_counter()


def openpi(step: Step, ticks: int, period_s: float, lateness_s: Samples) -> None:
    """By the wall clock: sleep what is left since the last step's time; that is now again."""
    last_s = deadline_s = time.time()
    for tick in range(ticks):
        step(tick)
        now_s = time.time()
        lateness_s[tick] = now_s - deadline_s
        deadline_s = last_s + period_s
        if now_s - last_s < period_s:
            time.sleep(period_s - (now_s - last_s))
            last_s = time.time()
        else:
            last_s = now_s


def lerobot(step: Step, ticks: int, period_s: float, lateness_s: Samples) -> None:
    """Each tick measures itself, and the rest of the period is slept."""
    deadline_s = time.perf_counter()
    for tick in range(ticks):
        start_s = time.perf_counter()
        step(tick)
        lateness_s[tick] = time.perf_counter() - deadline_s
        time.sleep(max(0.0, period_s - (time.perf_counter() - start_s)))
        deadline_s = start_s + period_s


PEERS = {"ILStudio": ilstudio, "openpi": openpi, "LeRobot": lerobot}
