"""The control loop: one call per tick, on absolute deadlines.

Guaranteed, however long a tick takes and however late the thread wakes up:

* Tick k is due at t0 + k·dt, computed from t0 each time, so the loop does not drift.
* Ticks are strictly increasing. A tick that cannot start within half a period of its deadline is
  skipped and counted as missed, so two steps never start closer than half a period. Late ticks are
  not bunched to catch up: two commands at once are a jump for a robot.

Rejected: sleeping dt after each tick (drifts by the tick's cost), deadline = last wake-up + dt
(drifts by the wake-up latency), running missed ticks back to back (bunches).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.control.clock import Clock
from runtime.latency_stats import Percentiles
from runtime.trace import recorder as trace

Step = Callable[[int], bool | None]
"""Called with the tick; the loop ends if it returns False, and goes on if it returns None."""
Slack = Callable[[int], None]
"""Called with the tick after its step, for work that may take the rest of the period."""


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """How well a loop kept its deadlines.

    Attributes:
        ticks: Ticks run.
        missed_ticks: Ticks skipped because an earlier one overran.
        lateness: Return of the step minus its deadline, over all ticks run; seconds.
    """

    ticks: int
    missed_ticks: int
    lateness: Percentiles


class ControlLoop:
    """Runs a step once per period on absolute deadlines of an injected clock.

    A tick allocates nothing that outlives it.

    Args:
        clock: The time source.
        period_s: Seconds per tick.
        capacity: Number of newest lateness samples kept; allocated here, not in the loop.

    Raises:
        ValueError: ``period_s`` is not positive.
    """

    def __init__(self, clock: Clock, period_s: float, *, capacity: int = 100_000) -> None:
        if not period_s > 0:
            raise ValueError(f"period_s: got {period_s}, expected a positive number of seconds")
        self._clock = clock
        self._period_ns = round(period_s * 1e9)
        self._lateness_ns = np.zeros(capacity, np.int64)
        self._ticks = 0
        self._missed = 0
        self._stopping = False

    @property
    def period_ns(self) -> int:
        """Nanoseconds per tick."""
        return self._period_ns

    def run(
        self,
        step: Step,
        max_ticks: int | None = None,
        *,
        slack: Slack | None = None,
    ) -> None:
        """Call ``step(k)`` at t0 + k·dt, k from 0, t0 being now, and ``slack(k)`` after it.

        Ends before tick ``max_ticks``, when ``step`` returns False, or after ``stop()``. An
        exception from either ends the loop and propagates. Lateness is measured when ``step``
        returns.
        """
        clock, period_ns, lateness_ns = self._clock, self._period_ns, self._lateness_ns
        capacity, tolerance_ns = len(lateness_ns), period_ns // 2
        self._stopping = False
        t0_ns = clock.now_ns()
        tick = 0
        while (max_ticks is None or tick < max_ticks) and not self._stopping:
            deadline_ns = t0_ns + tick * period_ns
            clock.wait_until_ns(deadline_ns)
            # The trace needs the machine's clock; the loop's may be a manual one.
            began_ns = time.monotonic_ns() if trace.on else 0
            proceed = step(tick)
            done_ns = clock.now_ns()
            lateness_ns[self._ticks % capacity] = done_ns - deadline_ns
            self._ticks += 1
            if proceed is False:
                if trace.on:
                    trace.add_tick(tick, began_ns, done_ns - deadline_ns, 0)
                break
            if slack is not None:
                slack(tick)
                done_ns = clock.now_ns()
            # The next tick is the first that can still start in time.
            next_tick = max(tick + 1, -(-(done_ns - t0_ns - tolerance_ns) // period_ns))
            if max_ticks is not None:
                next_tick = min(next_tick, max_ticks)
            self._missed += next_tick - tick - 1
            if trace.on:
                late_ns = int(lateness_ns[(self._ticks - 1) % capacity])
                trace.add_tick(tick, began_ns, late_ns, next_tick - tick - 1)
            tick = next_tick

    def stop(self) -> None:
        """End ``run`` after the tick in progress. Safe from a signal handler or another thread."""
        self._stopping = True

    def lateness_ns(self) -> NDArray[np.int64]:
        """(n,) the newest ``capacity`` lateness samples in nanoseconds, oldest first."""
        capacity = len(self._lateness_ns)
        if self._ticks <= capacity:
            return self._lateness_ns[: self._ticks].copy()
        return np.roll(self._lateness_ns, -(self._ticks % capacity))

    def statistics(self) -> LoopStatistics:
        """The counts of all runs so far."""
        return LoopStatistics(
            ticks=self._ticks,
            missed_ticks=self._missed,
            lateness=Percentiles.of(self.lateness_ns() / 1e9),
        )
