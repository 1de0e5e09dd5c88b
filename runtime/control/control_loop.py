"""The control loop: one call per tick, on absolute deadlines.

Guaranteed, whatever a tick costs and however late the machine wakes us:

* Tick k is due at t0 + k·dt, computed from t0 each time, so nothing drifts.
* Ticks are strictly increasing. One that cannot start within half a period of its deadline is
  skipped and counted as missed; so two steps never start closer than half a period. Late ticks are
  not bunched to catch up, because a robot that gets two commands at once has been given a jump.

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
from runtime.stats import Percentiles
from runtime.trace import recorder as trace

Step = Callable[[int], bool | None]
"""Called with the tick; a False return ends the loop. None goes on."""
Slack = Callable[[int], None]
"""Called with the tick after its step: work that may use up what is left of the period."""


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """What happened to the deadlines.

    Attributes:
        ticks: Ticks run.
        missed_ticks: Ticks skipped because the one before them overran.
        lateness: Time at which the step had returned − its deadline, over all ticks run; seconds.
    """

    ticks: int
    missed_ticks: int
    lateness: Percentiles


class ControlLoop:
    """Runs a step once per period on absolute deadlines of an injected clock.

    A tick allocates nothing that outlives it.

    Args:
        clock: Where time comes from.
        period_s: Seconds per tick.
        capacity: Lateness samples kept, the newest ones; allocated here, not in the loop.

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
        return self._period_ns

    def run(
        self,
        step: Step,
        max_ticks: int | None = None,
        *,
        slack: Slack | None = None,
    ) -> None:
        """Call ``step(k)`` at t0 + k·dt, k from 0, t0 being now, and ``slack(k)`` after it.

        Ends before tick ``max_ticks``, when ``step`` returns False, or after ``stop()``. What they
        raise ends the loop and is the caller's. Lateness is taken when ``step`` returns.
        """
        clock, period_ns, lateness_ns = self._clock, self._period_ns, self._lateness_ns
        capacity, tolerance_ns = len(lateness_ns), period_ns // 2
        self._stopping = False
        t0_ns = clock.now_ns()
        tick = 0
        while (max_ticks is None or tick < max_ticks) and not self._stopping:
            deadline_ns = t0_ns + tick * period_ns
            clock.wait_until_ns(deadline_ns)
            # Not of the loop's own clock, which may be anybody's.
            began_ns = time.monotonic_ns() if trace.on else 0
            going_on = step(tick)
            done_ns = clock.now_ns()
            lateness_ns[self._ticks % capacity] = done_ns - deadline_ns
            self._ticks += 1
            if going_on is False:
                if trace.on:
                    trace.tick(tick, began_ns, done_ns - deadline_ns, 0)
                break
            if slack is not None:
                slack(tick)
                done_ns = clock.now_ns()
            # The next tick is the first one that can still start in time.
            next_tick = max(tick + 1, -(-(done_ns - t0_ns - tolerance_ns) // period_ns))
            if max_ticks is not None:
                next_tick = min(next_tick, max_ticks)
            self._missed += next_tick - tick - 1
            if trace.on:
                late_ns = int(lateness_ns[(self._ticks - 1) % capacity])
                trace.tick(tick, began_ns, late_ns, next_tick - tick - 1)
            tick = next_tick

    def stop(self) -> None:
        """End ``run`` after the tick in progress. Safe from a signal handler or another thread."""
        self._stopping = True

    def lateness_ns(self) -> NDArray[np.int64]:
        """Raw lateness samples, (n,) nanoseconds, the newest ``capacity`` ones, oldest first."""
        capacity = len(self._lateness_ns)
        if self._ticks <= capacity:
            return self._lateness_ns[: self._ticks].copy()
        return np.roll(self._lateness_ns, -(self._ticks % capacity))

    def statistics(self) -> LoopStatistics:
        """The counts so far, of all runs; a frozen value."""
        return LoopStatistics(
            ticks=self._ticks,
            missed_ticks=self._missed,
            lateness=Percentiles.of(self.lateness_ns() / 1e9),
        )
